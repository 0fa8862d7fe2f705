"""Owns the hosts of a run: checked before they are taken, recorded before they are used, given back whatever happens.

It knows one kind of cluster: this machine.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from prefect import task
from prefect.cache_policies import NO_CACHE

from base import storage
from base.errors import CherryError, ConfigError, MissingFileError, OperationalError, storage_errors
from cherry.cluster import LOCAL, read_cluster
from cherry.planner.local import local_gpus
from cherry.planner.plan import Plan
from tasks.plan_record import predict, refuse, tell
from tasks.run_config import RunConfig
from tasks.steps import RunContext, StepRecord, StepRun, perform, sections, worth_retrying

# fp32 parameter, gradient and two AdamW moments.
_TRAINING_BYTES_PER_PARAMETER = 16
# fp32 parameter and two moments in a checkpoint; one more than is kept exists while a new one is written.
_CHECKPOINT_BYTES_PER_PARAMETER = 12
# What the plan is made of, besides the cluster and how it is launched.
_PLANNED = ["model", "data", "parallel", "communication", "train", "lora", "checkpoint"]
_HOST = socket.gethostname()
# A lease is renewed so often, and counts as left behind after so long: eight renewals that a slow disk may lose.
_RENEW_S = 15.0
_STALE_S = 120.0
logger = logging.getLogger(__name__)


@task(name="provision", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2, retry_condition_fn=worth_retrying)
def provision(context: RunContext) -> StepRecord:
    """Check this machine against the run's needs and its plan, and take a lease on it."""
    inputs = {
        **sections(context.config, ["cluster", "launch"]),
        "parameters": context.config.model.parameters(),
        "planned": storage.fingerprint(sections(context.config, _PLANNED)),
    }

    def work(step: StepRun) -> dict[str, str]:
        host, plan = preflight(context.config, context.path)
        step.say(f"{host['address']}: {host['cores']} cores, {host['memory_gib']:.1f} GiB memory, {host['gpus']} GPUs")
        step.metrics(cores=host["cores"], memory_gib=host["memory_gib"], disk_free_gib=host["disk_free_gib"])
        target = str(context.path / "hosts.json")
        storage.write_json(target, {"cluster": context.config.cluster, "hosts": [host]})
        told = {} if plan is None else tell(plan, context, step)
        return {"hosts": target, **told}

    take_lease(context)
    return perform(context, "provision", inputs, work)


def preflight(config: RunConfig, run_directory: Path) -> tuple[dict[str, Any], Plan | None]:
    """What this machine has, when that is enough, and the plan; `None` where the planner does not know the GPU.

    Raises:
        ConfigError: the run wants another cluster or more than this machine has.
        DoesNotFitError: the plan says so, and the configuration does not say to go on.
        OperationalError: disk or memory are short now, but may be freed.
    """
    cluster = read_cluster(config.cluster)
    if cluster.kind != LOCAL:
        refuse(predict(config, cluster), config)
        raise ConfigError(
            f"cluster: {config.cluster} is planned for, but only this machine (kind local) can be taken by a flow. "
            "Start cherry-launch on its nodes."
        )
    if config.launch.nnodes != 1:
        raise ConfigError(f"launch.nnodes: cluster {config.cluster!r} has one node (got {config.launch.nnodes})")
    gpus, ranks = len(local_gpus()), config.launch.nproc_per_node
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
    plan = predict(config, cluster)
    refuse(plan, config)
    host = {
        "address": "127.0.0.1",
        "slots": ranks,
        "cores": os.cpu_count() or 1,
        "gpus": gpus,
        "memory_gib": memory / 2**30,
        "disk_free_gib": disk / 2**30,
    }
    return host, plan


def take_lease(context: RunContext) -> None:
    """Record that this process uses the run directory, after dropping a lease whose process is gone.

    Raises:
        OperationalError: a live process, here or on another host, is working on the same run.
        StorageError: the directory's file system has no locks.
    """
    path = _lease(context.path)
    context.path.mkdir(parents=True, exist_ok=True)
    with locked(context.path):
        holder = read_lease(context.path)
        own = holder is not None and holder["pid"] == os.getpid() and _is_here(holder) and _runs(holder)
        if holder is not None and not own and is_held(context.path):
            raise OperationalError(
                f"{context.directory}: process {holder['pid']} on {holder.get('host', _HOST)} is working on this run. "
                "Wait for it, stop it, or give this run another name (name=...)."
            )
        token = holder["token"] if holder is not None and own else uuid.uuid4().hex
        process = {"host": _HOST, "boot": _boot(), "pid": os.getpid(), "created": psutil.Process().create_time()}
        storage.write_json(str(path), {**process, "token": token, "run_id": context.parent_run_id})
    if not own:
        threading.Thread(target=_keep_fresh, args=(context.path, token), name="lease", daemon=True).start()


@contextmanager
def locked(run_directory: Path) -> Iterator[None]:
    """Nobody else judges, takes or drops the lease meanwhile: what was read as dead is still dead when it is removed.

    The lock's file stays: whoever removed it could remove another one's lock.

    Raises:
        MissingFileError: there is no such directory.
        StorageError: its file system has no locks.
    """
    path = run_directory / "lease.lock"
    with storage_errors(str(path)):
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        with storage_errors(str(path)):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read_lease(run_directory: Path) -> dict[str, Any] | None:
    """What the holder wrote; `None` when nobody holds the directory."""
    try:
        lease: dict[str, Any] = storage.read_json(str(_lease(run_directory)))
    except MissingFileError:
        return None
    return lease


def is_held(run_directory: Path) -> bool:
    """Whether a live process holds the directory. Call it under `locked`.

    Another host's processes cannot be seen from here: its lease counts until it has not been renewed for a while.
    Both times are the file system's, so the hosts' clocks do not matter.
    """
    holder = read_lease(run_directory)
    if holder is None:
        return False
    if _is_here(holder):
        return _runs(holder)
    lock = run_directory / "lease.lock"
    os.utime(lock)
    # Opened, not only looked at: NFS answers a stat from its cache.
    with _lease(run_directory).open() as handle:
        renewed = os.fstat(handle.fileno()).st_mtime
    return lock.stat().st_mtime - renewed < _STALE_S


def drop_lease(run_directory: Path) -> None:
    """Remove the lease, whoever's it is. Call it under `locked`, after `is_held`."""
    _lease(run_directory).unlink(missing_ok=True)


def release(run_directory: str) -> None:
    """Give the lease back; nothing to do when another process holds it or none does."""
    path = Path(run_directory)
    if not path.is_dir():
        return
    with locked(path):
        lease = read_lease(path)
        if lease is not None and lease["pid"] == os.getpid() and _is_here(lease):
            drop_lease(path)


def _keep_fresh(run_directory: Path, token: str) -> None:
    """Renew the lease until it is given back or another one's; ends with the process."""
    while True:
        time.sleep(_RENEW_S)
        try:
            with locked(run_directory):
                lease = read_lease(run_directory)
                if lease is None or lease.get("token") != token:
                    return
                os.utime(_lease(run_directory))
        except MissingFileError:
            return
        except (OSError, CherryError) as error:
            logger.warning("the lease of %s was not renewed: %s", run_directory, error)


def _is_here(holder: Mapping[str, Any]) -> bool:
    """Whether the holder's pid means something here: the same host, not started again since."""
    return (holder.get("host", _HOST), holder.get("boot", _boot())) == (_HOST, _boot())


def _runs(holder: Mapping[str, Any]) -> bool:
    return is_alive(holder["pid"], holder["created"])


def _boot() -> str:
    """What is another one after each start of this machine."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else str(int(psutil.boot_time()))


def is_alive(pid: int, created: float) -> bool:
    """Whether the process that was started then still runs; a reused pid is another process."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < 1.0
    except psutil.NoSuchProcess:
        return False


def _lease(run_directory: Path) -> Path:
    return run_directory / "lease.json"
