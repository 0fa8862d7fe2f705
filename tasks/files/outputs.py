"""Outputs of steps as files: where they are, whether they are whole, and how one is set aside for another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from base import storage
from base.errors import CherryError

_IN_RUN = "{run_directory}/"
"""What a path inside the run directory begins with in a step's record: a moved or copied run finds its own files."""
DAMAGED = "damaged"


def stored_paths(run_directory: Path, outputs: Mapping[str, str]) -> dict[str, str]:
    """Outputs as a step's record on disk names them; see `found_paths`."""
    top = os.path.abspath(run_directory) + os.sep
    return {name: _stored(top, uri) for name, uri in outputs.items()}


def _stored(top: str, uri: str) -> str:
    path = os.path.abspath(storage.local_path(uri)) if storage.is_local(uri) else ""
    return _IN_RUN + path.removeprefix(top) if path.startswith(top) else uri


def found_paths(run_directory: Path, outputs: Mapping[str, str]) -> dict[str, str]:
    """Outputs of a step's record on disk, as paths and URIs."""
    return {
        name: str(run_directory / uri.removeprefix(_IN_RUN)) if uri.startswith(_IN_RUN) else uri
        for name, uri in outputs.items()
    }


def file_states(outputs: Mapping[str, str]) -> dict[str, list[Any]]:
    """[bytes, SHA-256] of those outputs that are files, by the output's name; directories have it in their marker."""
    states = {name: storage.stored_files(uri) for name, uri in outputs.items() if _may_be_file(uri)}
    return {name: state[""] for name, state in states.items() if "" in state}


def _may_be_file(uri: str) -> bool:
    return storage.is_local(uri) and not os.path.isdir(storage.local_path(uri))


def damages(outputs: Mapping[str, str], files: Mapping[str, list[Any]]) -> dict[str, storage.Damage]:
    """What is no longer as a step left it, by the output's path; empty when all of it is there.

    Args:
        files: states of the outputs that are files; those of a record of an earlier version are not known.
    """
    found = {uri: storage.damage(uri, {"": files[name]} if name in files else None) for name, uri in outputs.items()}
    return {uri: damage for uri, damage in found.items() if damage}


def clear_damage(uri: str, damage: storage.Damage) -> Path | None:
    """Make a damaged output count as not made; the path where files that somebody changed are kept, if there are any.

    A folder that only lost files stays in place, and is filled again.
    """
    if not storage.is_local(uri):
        storage.uncommit(uri)
        return None
    path = Path(storage.local_path(uri))
    if damage.changed and path.is_dir():
        return set_aside(path, f"{path.name}.{DAMAGED}")
    if path.is_dir():
        storage.uncommit(uri)
    return None


def set_aside(folder: Path, name: str) -> Path:
    """Path beside `folder`, of this name or with a number after it, to which it is moved.

    A link stays, to a new and empty directory: what it pointed at is moved there where it is, and linked as `name`.
    """
    target = folder.with_name(name)
    number = 1
    while os.path.lexists(target):
        number += 1
        target = folder.with_name(f"{name}.{number}")
    if folder.is_symlink():
        real = folder.resolve()
        target.symlink_to(os.path.relpath(set_aside(real, target.name), folder.parent.resolve()))
        real.mkdir()
    else:
        folder.rename(target)
    return target


def aside_path(folder: Path, identity: str) -> Path:
    """Path to which an output of a step with this fingerprint is moved when another one takes its place."""
    return folder.with_name(f"{folder.name}.{identity[:8]}")


def find_output(uri: str, identity: str, runs_directory: str) -> str:
    """URI of the output that a step with this fingerprint wrote to `uri`: there, or where it was moved since.

    It may have been set aside for another output, and with its run have gone to another `runs_directory`.
    """
    if not storage.is_local(uri):
        return uri
    there = Path(storage.local_path(uri))
    moved = Path(storage.local_path(runs_directory)).absolute() / there.parent.name / there.name
    if (aside := aside_path(there, identity)).is_dir():
        return str(aside)
    if there.exists() or moved == there:
        return uri
    if (aside := aside_path(moved, identity)).is_dir():
        return str(aside)
    return str(moved) if moved.is_dir() and identity in _fingerprints(moved.parent) else uri


def _fingerprints(run_directory: Path) -> set[str]:
    """Fingerprints of a run's finished steps; of a record that is cut short there is none."""
    found = set()
    for path in (run_directory / "steps").glob("*.json"):
        with suppress(CherryError, ValueError, KeyError, TypeError):
            found.add(str(storage.read_json(str(path))["fingerprint"]))
    return found
