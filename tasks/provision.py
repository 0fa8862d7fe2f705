"""Owns the hosts of a run: checked before they are taken, recorded before they are used, given back whatever happens.

It knows one kind of cluster: this machine.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import psutil
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import PositiveInt

from base import storage
from base.config import Section, load
from base.errors import ConfigError, MissingFileError, OperationalError
from tasks.config import RunConfig
from tasks.steps import RunContext, StepRecord, StepRun, perform, sections, worth_retrying

LOCAL = "local"
# fp32 parameter, gradient and two AdamW moments.
_TRAINING_BYTES_PER_PARAMETER = 16
# fp32 parameter and two moments in a checkpoint; one more than is kept exists while a new one is written.
_CHECKPOINT_BYTES_PER_PARAMETER = 12
# A lease may be dropped and taken again by others while this process tries.
_LEASE_ATTEMPTS = 5


class ClusterSpec(Section):
    """A file in configs/clusters/."""

    kind: Literal["local"]
    slots: PositiveInt | None = None
    """Ranks that a host may hold at one time; `None` leaves it to its GPUs."""


def read_cluster(name: str) -> ClusterSpec:
    """`local`, or the spec at a path.

    Raises:
        MissingFileError, ConfigError: no such file, or one that breaks a rule.
    """
    return ClusterSpec(kind="local") if name == LOCAL else load(name, ClusterSpec)


@task(name="provision", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2, retry_condition_fn=worth_retrying)
def provision(context: RunContext) -> StepRecord:
    """Check this machine against the run's needs, and take a lease on it."""
    inputs = {**sections(context.config, ["cluster", "launch"]), "parameters": context.config.model.parameters()}

    def work(step: StepRun) -> dict[str, str]:
        host = preflight(context.config, context.path)
        step.say(f"{host['address']}: {host['cores']} cores, {host['memory_gib']:.1f} GiB memory, {host['gpus']} GPUs")
        step.metrics(cores=host["cores"], memory_gib=host["memory_gib"], disk_free_gib=host["disk_free_gib"])
        target = str(context.path / "hosts.json")
        storage.write_json(target, {"cluster": context.config.cluster, "hosts": [host]})
        return {"hosts": target}

    take_lease(context)
    return perform(context, "provision", inputs, work)


def preflight(config: RunConfig, run_directory: Path) -> dict[str, Any]:
    """What this machine has, when that is enough.

    Raises:
        ConfigError: the run wants another cluster or more than this machine has.
        OperationalError: disk or memory are short now, but may be freed.
    """
    cluster = read_cluster(config.cluster)
    if config.launch.nnodes != 1:
        raise ConfigError(f"launch.nnodes: cluster {config.cluster!r} has one node (got {config.launch.nnodes})")
    gpus, ranks = _gpus(), config.launch.nproc_per_node
    if gpus and ranks > gpus:
        raise ConfigError(f"launch.nproc_per_node: this machine has {gpus} GPUs (got {ranks})")
    if cluster.slots is not None and ranks > cluster.slots:
        raise ConfigError(f"launch.nproc_per_node: cluster {config.cluster} has {cluster.slots} slots (got {ranks})")
    run_directory.mkdir(parents=True, exist_ok=True)
    parameters = config.model.parameters(with_mtp=True)
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(run_directory).free
    needed_memory = 0 if gpus else _TRAINING_BYTES_PER_PARAMETER * parameters
    needed_disk = _CHECKPOINT_BYTES_PER_PARAMETER * parameters * (config.checkpoint.keep_last + 1)
    if config.checkpoint.directory is not None and not storage.is_local(config.checkpoint.directory):
        needed_disk = 0
    for what, needed, free in (("memory", needed_memory, memory), ("disk", needed_disk, disk)):
        if needed > free:
            raise OperationalError(
                f"{what}: {parameters:,} parameters need at least {needed / 2**30:.1f} GiB here, "
                f"{free / 2**30:.1f} GiB are free. Free some, or take a smaller model."
            )
    return {
        "address": "127.0.0.1",
        "slots": ranks,
        "cores": os.cpu_count() or 1,
        "gpus": gpus,
        "memory_gib": memory / 2**30,
        "disk_free_gib": disk / 2**30,
    }


def _gpus() -> int:
    """GPUs that the driver lists, without torch."""
    root = Path("/proc/driver/nvidia/gpus")
    return len(list(root.iterdir())) if root.is_dir() else 0


def take_lease(context: RunContext) -> None:
    """Record that this process uses the run directory, after dropping a lease whose process is gone.

    Raises:
        OperationalError: a live process is working on the same run.
    """
    path = _lease(context.path)
    record = {"pid": os.getpid(), "created": psutil.Process().create_time(), "mlflow_run_id": context.parent_run_id}
    own = path.with_name(f"lease.{os.getpid()}.json")
    storage.write_json(str(own), record)
    try:
        for _ in range(_LEASE_ATTEMPTS):
            try:
                os.link(own, path)  # of two processes, one gets it, and it is whole at once
                return
            except FileExistsError:
                holder = _read_lease(path)
            if holder is not None and holder["pid"] == os.getpid():
                storage.write_json(str(path), record)
                return
            if holder is not None and is_alive(holder["pid"], holder["created"]):
                break
            path.unlink(missing_ok=True)
    finally:
        own.unlink()
    raise OperationalError(
        f"{context.directory}: process {holder['pid'] if holder else '?'} is working on this run. Wait for it, stop "
        "it, or give this run another name (name=...)."
    )


def _read_lease(path: Path) -> dict[str, Any] | None:
    try:
        lease: dict[str, Any] = storage.read_json(str(path))
    except MissingFileError:
        return None  # given back since
    return lease


def release(run_directory: str) -> None:
    """Give the lease back; nothing to do when another process holds it or none does."""
    path = _lease(Path(run_directory))
    lease = _read_lease(path)
    if lease is not None and lease["pid"] == os.getpid():
        path.unlink()


def is_alive(pid: int, created: float) -> bool:
    """Whether the process that was started then still runs; a reused pid is another process."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < 1.0
    except psutil.NoSuchProcess:
        return False


def _lease(run_directory: Path) -> Path:
    return run_directory / "lease.json"
