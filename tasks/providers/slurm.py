"""Slurm provider: nodes that Slurm gives to a job. Nothing is taken before training: the queue is waited in then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from base import storage
from base.config import dump
from base.errors import ConfigError
from cherry.launcher import TRAIN_MODULE
from cherry.remote.job import Job
from cherry.slurm.script import SlurmJob, render
from cherry.slurm.submit import cancel_named, check
from tasks.processes.programs import module_command
from tasks.providers.protocol import CLUSTER_FILE, Host, Hosts, Reservation, held_reservation


class SlurmProvider:
    """A Slurm cluster; see `tasks.providers.protocol.Provider`."""

    def check(self, reservation: Reservation) -> None:
        """Check that Slurm would take the job, by `sbatch --test-only`.

        Raises:
            ConfigError: it never would; or the cluster file has fewer nodes, or GPUs on each.
            ServiceError: Slurm's controller does not answer now.
        """
        asked = reservation.nodes, reservation.ranks_per_node
        if found := "; ".join(map(str, reservation.spec.excess(reservation.cluster, *asked))):
            raise ConfigError(found)
        check(_job(reservation, example_arguments(reservation.run_directory)))

    def acquire(self, reservation: Reservation) -> Hosts:
        """Places for the nodes that Slurm will choose when the job starts."""
        directory = Path(reservation.run_directory)
        storage.write_bytes(str(directory / CLUSTER_FILE), dump(reservation.spec).encode())
        gpus = reservation.ranks_per_node if reservation.spec.has_gpus else 0
        places = (f"slurm-node-{number}" for number in range(1, reservation.nodes + 1))
        return Hosts(
            provider=reservation.provider,
            cluster=reservation.cluster,
            hosts=tuple(Host(address=place, cores=1, gpus=gpus, memory_gib=0.0) for place in places),
            ranks_per_node=reservation.ranks_per_node,
            master_addr="slurm-node-1",
            master_port=None,
            allocation=reservation.run_directory,
        )

    def is_alive(self, hosts: Hosts) -> bool:
        """Whether the job may be submitted: the hosts were not released."""
        try:
            return bool(held_reservation(hosts))
        except ConfigError:
            return False

    def commands(self, hosts: Hosts, arguments: Sequence[str]) -> list[list[str]]:
        """Command that submits the job, follows it to its end, and cancels it when it is ended itself.

        Raises:
            ConfigError: the hosts were released.
        """
        reservation = held_reservation(hosts)
        flags = [f"--cluster={Path(reservation.run_directory) / CLUSTER_FILE}", f"--name={reservation.name}"]
        flags += [f"--nnodes={reservation.nodes}", f"--nproc_per_node={reservation.ranks_per_node}"]
        return [module_command("cherry.slurm.submit", [*flags, *arguments])]

    def release(self, reservation: Reservation) -> None:
        """Cancel the run's job, which is found by its name, if there is one.

        Raises:
            ServiceError: Slurm's controller does not answer.
        """
        cancel_named(reservation.name)


def script_of(reservation: Reservation, arguments: Sequence[str]) -> str:
    """Text of the sbatch script of a reservation's job.

    Args:
        arguments: the training program and its own arguments.

    Raises:
        ConfigError: a path cannot be written in an sbatch option.
    """
    return render(_job(reservation, arguments))


def example_arguments(run_directory: str) -> list[str]:
    """The training program and its arguments, as the flow has them for a run without a checkpoint directory."""
    return ["-m", TRAIN_MODULE, "--config", str(Path(run_directory) / "config.yaml"), "--run_dir", run_directory]


def _job(reservation: Reservation, arguments: Sequence[str]) -> SlurmJob:
    job = Job(reservation.spec, reservation.nodes, reservation.ranks_per_node, tuple(arguments))
    return SlurmJob(job, reservation.name, Path(reservation.run_directory).resolve())
