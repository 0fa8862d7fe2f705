"""Clean-up after a flow that was killed outright, from what it left on disk."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from base import storage
from base.errors import CherryError, DataError
from base.json_lines import as_record
from tasks.lease import drop_lease, is_held, locked, read_lease
from tasks.overrides import DEFAULT_CONFIG, resolve, run_directory
from tasks.processes.process import Pid, end_tree, is_alive
from tasks.provision import release_hosts
from tasks.run_config import RunConfig
from tasks.steps import PROGRAM
from tasks.tracking.connect import connect

logger = logging.getLogger(__name__)
FLOW_RUN = "flow_run.json"
"""Id of the flow's MLflow run, for a clean-up by another process."""


@dataclass(frozen=True)
class _Program:
    """What the record of a step's program has."""

    pid: Pid
    created: float


def teardown(flow: Any, flow_run: Any, state: Any) -> None:
    """Clean up after a flow that was cancelled or crashed: a Prefect hook, which runs in another process.

    It works from the run directory alone, and ends what the flow's process could not end because it was killed.
    """
    try:
        config = flow_run.parameters.get("config", DEFAULT_CONFIG)
        end_leftovers(resolve(config, flow_run.parameters.get("overrides") or {}))
    except CherryError as error:
        logger.warning("nothing to tear down: %s", error)


def end_leftovers(config: RunConfig) -> None:
    """End what a flow left that was killed outright: its program, its hosts, its lease, and its runs in MLflow."""
    directory = Path(run_directory(config))
    if not directory.is_dir():
        return
    # Under the lock to the end: the next holder of the lease continues the MLflow runs that are ended here.
    with locked(directory):
        if is_held(directory):
            return  # the process still works, or cleans up by itself
        lease = read_lease(directory)
        _end_program(directory / PROGRAM)
        release_hosts(directory)
        if lease is not None:
            tracker = connect(config.tracking, config.runs_directory).runs
            tracker.finish(_tracked_run(directory / FLOW_RUN), "KILLED", family=True)
            drop_lease(directory)


def _end_program(path: Path) -> None:
    """End the program that a step's record names, and remove the record.

    Raises:
        DataError: it is damaged.
    """
    if not path.exists():
        return
    try:
        program = as_record(_Program, storage.read_json(str(path)))
    except ValueError:
        program = None
    if program is None:
        raise DataError(
            f"{path}: it is damaged, so nobody can tell which program works on this run. Make sure that none does, and "
            "remove it."
        )
    if is_alive(program.pid, program.created):
        end_tree(psutil.Process(program.pid))
    path.unlink(missing_ok=True)


def _tracked_run(path: Path) -> str | None:
    """Id of the flow's tracked run; `None` where it is not told, or the record is damaged: the next flow finds it."""
    try:
        run_id = storage.read_json(str(path))["run_id"] if path.exists() else None
    except (ValueError, TypeError, KeyError):
        return None
    return run_id if isinstance(run_id, str) else None
