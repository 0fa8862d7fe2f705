"""The claim of a run on a directory of checkpoints that other runs may name too: one directory holds one run."""

from __future__ import annotations

import json
import os
from typing import Any

from base import storage
from base.errors import ConfigError, MissingFileError
from base.exclusive import create
from cherry.checkpoint.resume_rules import checkpoints_of, identity, settled
from cherry.data.shards import Manifest
from cherry.job_config import JobConfig

CLAIM_FILE = "run.json"
"""Name of the file in a directory of checkpoints that says whose they are."""


def fenced_directories(config: JobConfig, run_directory: str) -> list[str]:
    """The directories that attempts of a run must not write to at a time, for their fence.

    A directory of checkpoints outside the run directory is one of its own: another host may see it alone.
    """
    outside = _outside(config, run_directory)
    return [storage.join(run_directory, "train"), *([] if outside is None else [outside])]


def _outside(config: JobConfig, run_directory: str) -> str | None:
    """URI of the run's directory of checkpoints where it lies outside the run directory; else `None`."""
    directory = settled(checkpoints_of(config, run_directory))
    return None if directory.startswith(settled(run_directory).rstrip("/") + "/") else directory


def claim_checkpoints(config: JobConfig, manifest: Manifest, run_directory: str) -> None:
    """Claim the configured directory of checkpoints for a run, unless it lies in the run directory.

    The run whose directory made the claim may train on there. Where that directory is gone, as after the loss of a
    host or a move, a run of the same name, model, data and recipe is that run. It asks storage: call it on one rank
    only.

    Raises:
        ConfigError: the directory is another run's; the text names both.
    """
    directory, own = _outside(config, run_directory), settled(run_directory)
    if directory is None:
        return
    claim = {"name": config.name, "run_directory": own, "fingerprint": _fingerprint(config, manifest)}
    uri = storage.join(directory, CLAIM_FILE)
    storage.make_directory(directory)
    if create(uri, (json.dumps(claim, indent=2) + "\n").encode()):  # of runs that begin together, one has it
        return
    held = _read(uri)
    if held is not None and held.get("run_directory") != own:
        there = os.path.isdir(str(held.get("run_directory")))
        if there or any(held.get(key) != claim[key] for key in ("name", "fingerprint")):
            raise ConfigError(
                f"checkpoint.directory {directory} holds the checkpoints of run {held.get('name')!r} "
                f"({held.get('run_directory')}), and this is run {config.name!r} ({own}). Give each run a directory of "
                f"its own; to begin here from one of those checkpoints, name it with --resume_from. If that run is not "
                f"needed any more, remove {uri} and its checkpoints."
            )
    if held != claim:
        storage.write_json(uri, claim)


def _read(uri: str) -> dict[str, Any] | None:
    """The claim at `uri`; `None` where there is none, or what a power cut left of one."""
    try:
        held = storage.read_json(uri)
    except (MissingFileError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def _fingerprint(config: JobConfig, manifest: Manifest) -> str:
    """Fingerprint of what may not change when a run goes on."""
    return storage.fingerprint({"model": config.model.model_dump(mode="json"), **identity(config, manifest)})
