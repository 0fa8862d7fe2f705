"""A job for several hosts: what `cherry-launch --cluster` was asked for, and the launcher's arguments on each host."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from base import storage
from base.errors import ArgumentParser, ConfigError
from cherry.cluster import ClusterSpec, NodeSpec, read_cluster
from cherry.job_config import NETWORK_VARIABLE, JobConfig
from cherry.launcher import TRAIN_MODULE, TRAIN_SCRIPT, run_directory_of

ATTEMPTS_FILE = "attempts.jsonl"
"""File in `train/` of the run directory with a line for the begin and the end of each start of the job."""
# What programs on the hosts need of the environment here: credentials, settings of libraries. No PATH, no GPUs.
_PASSED_ON = (
    *("AWS_", "AZURE_", "FSSPEC_", "GOOGLE_", "HF_", "GLOO_", "NCCL_", "OMP_", "TORCH_", "TORCHINDUCTOR_"),
    *("NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY"),
)


@dataclass(frozen=True)
class Job:
    """A training program on a number of nodes of a cluster."""

    spec: ClusterSpec
    nodes: int
    ranks_per_node: int
    program: tuple[str, ...]
    """The training program and its arguments, after the launcher's flags."""

    @property
    def run_directory(self) -> str | None:
        """The run directory that the program's --run_dir names; `None` without one."""
        return run_directory_of(self.program)

    @property
    def local_directory(self) -> Path | None:
        """The run directory where it is on a file system, and exists; else `None`."""
        directory = self.run_directory
        if directory is None or not storage.is_local(directory):
            return None
        path = Path(storage.local_path(directory)).resolve()
        return path if path.is_dir() else None

    @property
    def host_directory(self) -> str | None:
        """The run directory on a host; `None` without one, or where the one that all would share does not exist.

        Hosts that share no file system have one of their own, whose name tells equal names of runs apart.
        """
        own, here = self.spec.ssh.runs_directory, self.run_directory
        if own is None or here is None:
            return None if self.local_directory is None else str(self.local_directory)
        path = Path(storage.local_path(here)).resolve()
        return f"{own}/{path.name}-{hashlib.sha256(bytes(path)).hexdigest()[:8]}"

    @property
    def candidates(self) -> list[NodeSpec]:
        """Hosts that the job may run on, in the order in which they are taken."""
        return [*self.spec.named, *self.spec.recovery.spares]

    def launcher_arguments(self, nodes: int, node_rank: int, address: str, port: int) -> list[str]:
        """Arguments of the launcher on one host; ranks that fail are not started again in place."""
        return [
            *(f"--nproc_per_node={self.ranks_per_node}", f"--nnodes={nodes}", f"--node_rank={node_rank}"),
            *(f"--master_addr={address}", f"--master_port={port}", "--max-restarts=0"),
            *map(self._on_host, self.program),
        ]

    def _on_host(self, word: str) -> str:
        """A word of the program's arguments on a host, whose run directory may be at another path."""
        here, there = self.run_directory, self.host_directory
        if self.spec.ssh.runs_directory is None or here is None or there is None:
            return word
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        inside = value == here or value.startswith(here.rstrip("/") + "/")
        return f"{flag}{equals}{there}{value.removeprefix(here.rstrip('/'))}" if inside else word

    def environment(self, node: NodeSpec, interface: str | None) -> dict[str, str]:
        """Environment variables for the launcher on a host, over those that the host has.

        Args:
            interface: the host's network interface; the job's own setting comes before it.
        """
        passed = {name: value for name, value in os.environ.items() if name.upper().startswith(_PASSED_ON)}
        network = self.spec.communication.given()
        if interface is not None:
            network["interface"] = interface
        gpus = {} if node.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, node.gpus))}
        return {**passed, NETWORK_VARIABLE: json.dumps(network), **gpus}

    def fits(self, nodes: int) -> bool:
        """Whether the program's configuration is valid on so many nodes; true where that cannot be told here."""
        if not any(Path(word).name in (TRAIN_SCRIPT, TRAIN_MODULE) for word in self.program[:2]):
            return True
        try:
            self.config(nodes)
        except ConfigError:
            return False
        return True

    def config(self, nodes: int) -> JobConfig:
        """Configuration of the training program on so many nodes.

        Raises:
            ConfigError: it is not valid, or the program's flags are not those of train.py.
        """
        from cherry.rank_main import build_parser, resolve

        flags = self.program[2:] if self.program[0] == "-m" else self.program[1:]
        return resolve(build_parser().parse_args(flags), self._rank_environment(nodes))

    def _rank_environment(self, nodes: int) -> Mapping[str, str]:
        ranks = self.ranks_per_node
        return {"WORLD_SIZE": str(nodes * ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": "29500"}


def build_parser() -> ArgumentParser:
    """The flags of `cherry-launch` with --cluster; the others are set for each host."""
    parser = ArgumentParser(
        prog="cherry-launch",
        description="Start a training program on all nodes of a cluster file, or as a Slurm job where its provider is "
        "slurm, and again when a host is lost. Without "
        "--cluster, cherry-launch starts the ranks of this node and takes torchrun's flags.",
    )
    parser.add_argument("--cluster", required=True, metavar="FILE", help="a cluster file that names its nodes")
    parser.add_argument("--nnodes", type=int, help="nodes to take, the first of the list (default: all)")
    parser.add_argument("--nproc_per_node", type=int, help="ranks on each (default: as many as it has GPUs listed)")
    parser.add_argument("--name", help="name of the job under Slurm (default: made of the run directory)")
    parser.add_argument("--module", "-m", action="store_true", help="the program is a module, as in python -m")
    parser.add_argument("program", help="the training program, like train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    return parser


def parse_job(arguments: Sequence[str]) -> Job:
    """The job of a command line, on hosts that its cluster file names.

    Raises:
        MissingFileError, ConfigError: a flag or the cluster file is wrong.
    """
    options = build_parser().parse_args(arguments)
    job = job_of(options)
    if not job.spec.named:
        raise ConfigError(
            f"{options.cluster}: names no hosts to start on. List them, like nodes: [{{host: node1}}, {{host: node2}}]."
        )
    return job


def job_of(options: argparse.Namespace) -> Job:
    """The job of the flags of `build_parser`.

    Raises:
        MissingFileError, ConfigError: a flag or the cluster file is wrong.
    """
    spec = read_cluster(options.cluster)
    nodes = spec.node_count if options.nnodes is None else options.nnodes
    ranks = spec.node_gpus if options.nproc_per_node is None else options.nproc_per_node
    if not 1 <= nodes <= spec.node_count:
        raise ConfigError(
            f"cherry-launch: --nnodes must be from 1 to {spec.node_count}, the cluster's nodes (got {nodes})"
        )
    if ranks < 1:
        raise ConfigError(f"cherry-launch: --nproc_per_node must be at least 1 (got {ranks})")
    module = ["-m"] if options.module else []
    return Job(spec, nodes, ranks, (*module, options.program, *options.arguments))
