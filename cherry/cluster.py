"""Cluster specs (configs/clusters): GPUs and nodes, provider, price, failure rate and storage bandwidth.

A plan computes with them (cherry/planner); a provider takes the hosts (tasks/providers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from base.config import Problem, Section, load
from cherry.hardware import GPUS

LOCAL = "local"
# Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, section 3.3.4).
LLAMA3_INTERRUPTIONS_PER_GPU_DAY = 419 / (54 * 16384)


class ClusterSpec(Section):
    """A cluster as a file in configs/clusters/ describes it."""

    kind: Literal["local", "nodes"]
    """`local` is this machine; `nodes` is a cluster of `nodes` equal hosts."""
    provider: str | None = None
    """Name of the provider that takes the hosts (tasks/providers); `null` with kind `nodes` is a cluster for plans."""
    slots: PositiveInt | None = None
    """Ranks that this machine may run at one time; `null` allows as many as it has GPUs."""
    gpu: str | None = None
    """A name in cherry/hardware.py; with kind `local`, `null` takes the device that is found."""
    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 1
    hosts: tuple[str, ...] = ()
    """Addresses of the nodes, for a provider that connects to given hosts."""
    price_per_gpu_hour: NonNegativeFloat | None = None
    """Price in any currency; `null` leaves costs out of the plan."""
    interruptions_per_gpu_day: NonNegativeFloat = LLAMA3_INTERRUPTIONS_PER_GPU_DAY
    detection_s: NonNegativeFloat = 60.0
    """Seconds from a failure to the end of the attempt. A lost process is detected in a second, a lost node within a
    heartbeat, a hang only after communication.timeout_s. Assumed."""
    restart_s: NonNegativeFloat = 240.0
    """Seconds from the end of an attempt until the next one reads its checkpoint: host, imports, NCCL init. Assumed."""
    storage_write_bytes_s: PositiveFloat = 50e9
    """Bytes/s of all ranks together to checkpoint storage. Assumed: a mid-sized parallel file system."""
    storage_read_bytes_s: PositiveFloat = 100e9
    """Bytes/s of all ranks together from checkpoint storage. Assumed."""
    assumed_imbalance: float = Field(default=1.22, ge=1.0)
    """EP load imbalance: routed rows of the busiest EP rank over the mean. 1.22 is what the selection bias reached per
    expert (benchmarks/results/load_balance.jsonl); ranks that hold several experts are more even."""

    @property
    def gpus(self) -> int:
        """Number of GPUs of the whole cluster."""
        return self.nodes * self.gpus_per_node

    @property
    def hardware(self) -> str:
        """Name in cherry/hardware.py of a rank's device."""
        return self.gpu or "laptop"

    def problems(self) -> Iterator[Problem]:
        """Unknown hardware, keys that do not go with the kind, and hosts named twice or not all."""
        if self.gpu is not None and self.gpu not in GPUS:
            yield Problem("gpu", f"unknown hardware; known are {', '.join(GPUS)}", self.gpu)
        if self.kind == "nodes" and self.gpu is None:
            yield Problem("gpu", f"is required with kind nodes: one of {', '.join(GPUS)}", None)
        if self.kind == LOCAL and self.provider not in (None, LOCAL):
            yield Problem("provider", "must be local, or left out, with kind local", self.provider)
        if self.hosts and (self.kind == LOCAL or self.provider is None):
            yield Problem("hosts", "are for kind nodes with a provider, which connects to them", list(self.hosts))
        twice = [host for host, count in Counter(self.hosts).items() if count > 1]
        if twice:
            yield Problem("hosts", f"each host must be named once, and {', '.join(twice)} is twice", list(self.hosts))
        elif self.hosts and len(self.hosts) != self.nodes:
            yield Problem("hosts", f"must name all of the {self.nodes} nodes or none", len(self.hosts))
        if self.kind == "local" and self.nodes != 1:
            yield Problem("nodes", "must be 1 with kind local: it is this machine only", self.nodes)


def read_cluster(name: str) -> ClusterSpec:
    """The cluster spec at a path, or this machine's for `local`.

    Raises:
        MissingFileError, ConfigError: no such file, or one that breaks a rule.
    """
    return ClusterSpec(kind="local") if name == LOCAL else load(name, ClusterSpec)
