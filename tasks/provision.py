"""Provision: the hosts of a run, checked against its plan, recorded before they are taken, and released.

`reservation.json` stands in the run directory from before hosts are taken until they are released. A process that finds
one whose flow is gone releases them (`tasks.interruptions.leftovers.end_leftovers`).
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from base import storage
from base.durations import duration_text
from base.errors import CherryError, InvalidInputError, OperationalError
from cherry.cluster import read_cluster
from cherry.planner.plan import Plan, checkpoint_bytes
from tasks.lease import drop_lease, is_own, locked
from tasks.plan_record import predict, record_plan, refuse
from tasks.providers.protocol import (
    HOSTS_FILE,
    RESERVATION_FILE,
    Hosts,
    Provider,
    Reservation,
    read_hosts,
    read_reservation,
    write_hosts,
    write_reservation,
)
from tasks.providers.registry import find_provider, provider_name, reservation_of
from tasks.run_config import RunConfig
from tasks.steps import RunContext, StepRecord, StepRun, perform, sections, worth_retrying

# Sections that the plan depends on, besides the cluster and the launch.
_PLANNED = ["model", "data", "parallel", "communication", "train", "lora", "checkpoint"]
_GIB = 2**30
logger = logging.getLogger(__name__)


@task(
    name="provision",
    task_run_name="provision",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=worth_retrying,
)
def provision(context: RunContext) -> StepRecord:
    """Plan the run, check that its cluster has what the plan needs, and take the hosts."""
    inputs = {
        **sections(context.config, ["cluster", "launch"]),
        "parameters": context.config.model.parameters(),
        "planned": storage.fingerprint(sections(context.config, _PLANNED)),
    }

    def work(step: StepRun) -> dict[str, str]:
        hosts, plan = take_hosts(context)
        first, disk_free_gib = hosts.hosts[0], _free_disk(context.path) / _GIB
        more = f", and {len(hosts.hosts) - 1} more hosts" if len(hosts.hosts) > 1 else ""
        step.say(f"{first.address}: {first.cores} cores, {first.memory_gib:.1f} GiB memory, {first.gpus} GPUs{more}")
        step.metrics(cores=first.cores, memory_gib=first.memory_gib, disk_free_gib=disk_free_gib)
        planned = {} if plan is None else record_plan(plan, context, step)
        return {"hosts": str(context.path / HOSTS_FILE), **planned}

    return perform(context, "provision", inputs, work)


def preflight(config: RunConfig, run_directory: Path, name: str) -> tuple[Reservation, Plan | None]:
    """Reservation that the provider has accepted, and the plan; `None` where the planner does not know the device.

    Args:
        name: unique to the run directory.

    Raises:
        ConfigError: the provider is not installed, or the cluster does not have the hosts that the run needs; or its
            hosts share no file system, and lack a path that the run names.
        DoesNotFitError: by the plan, memory is short, and plan.refuse is not false.
        OperationalError: disk or memory are short now, but may be freed.
    """
    spec = read_cluster(config.cluster)
    provider_name(config.cluster, spec)  # a cluster that nobody can take hosts of needs no plan
    plan = predict(config, spec)
    refuse(plan, config)
    # A run that starts against its plan is not stopped by the plan's figures here either.
    memory = plan.host_bytes_per_node if plan is not None and config.plan.refuse else 0
    reservation = reservation_of(config, spec, str(run_directory), name, memory_bytes_per_node=memory)
    find_provider(reservation.provider).check(reservation)
    check_disk(config, _free_disk(run_directory))
    return reservation, plan


def check_disk(config: RunConfig, free_bytes: int) -> None:
    """Check that the run directory's disk has room for the run's checkpoints.

    Raises:
        OperationalError: there is no room now, but some may be freed.
    """
    if config.checkpoint.directory is not None and not storage.is_local(config.checkpoint.directory):
        return
    # One more than is kept exists while a new one is written.
    count, each = config.checkpoint.keep_last + 1, checkpoint_bytes(config)
    if count * each > free_bytes:
        raise OperationalError(
            f"disk: {count} checkpoints of {each / _GIB:.1f} GiB (checkpoint.keep_last and the one being written) need "
            f"{count * each / _GIB:.1f} GiB, {free_bytes / _GIB:.1f} GiB are free. Free some, or put checkpoints "
            "elsewhere with checkpoint.directory."
        )


def _free_disk(run_directory: Path) -> int:
    run_directory.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(run_directory).free


def take_hosts(context: RunContext) -> tuple[Hosts, Plan | None]:
    """The run's hosts, newly taken and recorded, and its plan.

    Raises:
        CherryError: see `preflight`, and the provider's own.
    """
    name = f"{context.config.name}-{context.key[:8]}"
    left = read_reservation(context.path)
    if left is not None:  # of an attempt that broke off between asking and getting
        _release_reservation(context.path, left)
    reservation, plan = preflight(context.config, context.path, name)
    write_reservation(context.path, reservation)
    hosts = find_provider(reservation.provider).acquire(reservation)
    write_hosts(context.path, hosts)
    return hosts, plan


def hold_hosts(context: RunContext) -> tuple[Provider, Hosts]:
    """The run's provider and hosts: those it holds, or new ones when they were released or no longer answer.

    Raises:
        CherryError: see `refuse_overdue` and `take_hosts`.
    """
    reservation = read_reservation(context.path)
    if reservation is not None:
        refuse_overdue(reservation)
    if reservation is not None and (context.path / HOSTS_FILE).exists():
        hosts = read_hosts(context.path)
        provider = find_provider(hosts.provider)
        if provider.is_alive(hosts):
            return provider, hosts
    hosts, _ = take_hosts(context)
    return find_provider(hosts.provider), hosts


def refuse_overdue(reservation: Reservation) -> None:
    """Let a run fail whose hosts have reached their maximum lifetime: another attempt would hold them longer.

    Raises:
        InvalidInputError: they have.
    """
    if reservation.until is not None and time.time() >= reservation.until:
        held = duration_text(reservation.until - (reservation.since or reservation.until))
        raise InvalidInputError(
            f"max_lifetime: the hosts of {reservation.cluster} were held for {held}, the longest that its cluster file "
            "allows. Start the run again, which takes hosts anew and resumes from the newest checkpoint, or allow more "
            "there."
        )


def release(run_directory: str) -> None:
    """Release the hosts and the lease; do nothing when another process holds the run or none does."""
    path = Path(run_directory)
    if not path.is_dir():
        return
    with locked(path):
        if is_own(path):
            try:
                release_hosts(path)
            finally:
                drop_lease(path)


def release_hosts(run_directory: Path) -> None:
    """Release the hosts of the run directory's reservation. Call it under `tasks.lease.locked`.

    Best effort: a provider that cannot be reached is logged, and the reservation stays for the run's next start.
    """
    try:
        reservation = read_reservation(run_directory)
        if reservation is not None:
            _release_reservation(run_directory, reservation)
    except CherryError as error:
        logger.error("hosts of %s are not released: %s Start the run again to release them.", run_directory, error)


def _release_reservation(run_directory: Path, reservation: Reservation) -> None:
    find_provider(reservation.provider).release(reservation)
    (run_directory / RESERVATION_FILE).unlink(missing_ok=True)
