"""`cherry gc`: what in a runs directory nothing refers to any more, listed, and removed only when that is confirmed.

That is stored data that no run links to, and outputs that steps have set aside for those of another config.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from base import storage
from base.config import load
from base.errors import CherryError
from base.yaml_config import read_yaml
from tasks.files.data_store import entries_folder, lock_of, stored_entry
from tasks.files.file_lock import try_lock
from tasks.files.outputs import DAMAGED
from tasks.lease import is_held, locked
from tasks.processes.replicas import ServingDirectory
from tasks.run_config import RunConfig
from tasks.tracking.connect import connect

# Folders of steps' outputs, and what is added to the name of one that is set aside.
_SET_ASIDE = re.compile(rf"(data|train|export|quantized(?:-\w+)?|evaluate)\.([0-9a-f]{{8}}|{DAMAGED})(\.\d+)?")


@dataclass(frozen=True)
class Garbage:
    """A directory that nothing refers to."""

    path: Path
    bytes: int
    last_used: float
    """Unix time."""
    what: str


@dataclass(frozen=True)
class Survey:
    """What `find_garbage` found."""

    garbage: list[Garbage]
    kept: dict[Path, str]
    """Directories that look like garbage, with the reason for which they stay."""


def collect(console: Console, runs_directory: Path, *, yes: bool) -> None:
    """List what nothing refers to, with sizes and times, and remove it if `yes` or the person at the terminal says so.

    Raises:
        StorageError: a directory could not be read or removed.
    """
    survey = find_garbage(runs_directory)
    for path, reason in survey.kept.items():
        console.print(f"kept: {path}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if not survey.garbage:
        console.print(f"nothing to remove in {runs_directory}", highlight=False, markup=False)
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("size", "last used", "what", "directory"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "size" else "left")
    for item in survey.garbage:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.last_used))
        table.add_row(_readable(item.bytes), used, item.what, escape(str(item.path)))
    console.print(table)
    total = _readable(sum(item.bytes for item in survey.garbage))
    if not yes and not (sys.stdin.isatty() and click.confirm(f"Remove these, {total}?")):
        console.print(f"nothing was removed; `cherry gc --yes` removes these, {total}", highlight=False)
        return
    for item in survey.garbage:
        done = "removed" if remove(item, runs_directory) else "kept, for something refers to it now"
        console.print(f"{done}: {item.path}", highlight=False, markup=False, soft_wrap=True)


def _readable(size: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"


def find_garbage(runs_directory: Path) -> Survey:
    """Stored data that no run links to, and set-aside outputs that no run, version, replica or live process uses."""
    garbage, kept = [], {}
    for entry in _unlinked(runs_directory):
        with try_lock(lock_of(entry)) as free:
            if free:
                last_used = lock_of(entry).stat().st_mtime
                garbage.append(Garbage(entry, _bytes(entry), last_used, "prepared data that no run links to"))
            else:
                kept[entry] = "a run prepares it"
    references = _References(runs_directory)
    for folder in _set_aside(runs_directory):
        with locked(folder.parent):
            reason = references.reason(folder)
        if reason is not None:
            kept[folder] = reason
        else:
            what = "damaged output, kept when it was made again" if DAMAGED in folder.name else "output set aside"
            garbage.append(Garbage(folder, _bytes(folder), folder.stat().st_mtime, what))
    return Survey(sorted(garbage, key=lambda item: item.last_used), kept)


def remove(garbage: Garbage, runs_directory: Path) -> bool:
    """Remove a directory unless something refers to it by now; whether it was removed."""
    path = garbage.path
    stored = path.parent.resolve() == entries_folder(runs_directory).resolve()
    with ExitStack() as held:
        if stored:
            if not held.enter_context(try_lock(lock_of(path))) or path not in _unlinked(runs_directory):
                return False
        else:
            held.enter_context(locked(path.parent))
            if _References(runs_directory).reason(path) is not None:
                return False
        if stored_entry(path) is not None:
            path.unlink()  # the data has an entry of its own in the list once nothing links to it
        else:
            storage.remove_tree(str(path))
        if path.is_symlink():
            path.resolve().rmdir()
            path.unlink()
    return True


def _unlinked(runs_directory: Path) -> list[Path]:
    """Directories of the store that no run has a link to."""
    linked = {entry for link in runs_directory.glob("*/*") if (entry := stored_entry(link)) is not None}
    folder = entries_folder(runs_directory)
    entries = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(entry for entry in entries if entry.resolve() not in linked)


def _set_aside(runs_directory: Path) -> list[Path]:
    runs = [path.parent for path in runs_directory.glob("*/config.yaml")]
    return sorted(path for run in runs for path in run.iterdir() if _SET_ASIDE.fullmatch(path.name) and path.is_dir())


def _bytes(folder: Path) -> int:
    """Bytes that removing the folder frees; none for a link to stored data."""
    if stored_entry(folder) is not None:
        return 0
    paths = (os.path.join(top, name) for top, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(path).st_size for path in paths)


class _References:
    """What runs, registered versions, replicas and live processes refer to."""

    def __init__(self, runs_directory: Path) -> None:
        self._configs = {path.parent: path for path in sorted(runs_directory.glob("*/config.yaml"))}
        self._uses: dict[str, str] = {}
        for run, path in self._configs.items():
            for text in _texts(read_yaml(str(path))):
                self._uses.setdefault(os.path.realpath(text), f"the config of {run.name} names it")
        for server in ServingDirectory(str(runs_directory)).servers():
            self._uses.setdefault(os.path.realpath(server.model), f"{server.name} serves it")
        self._runs_directory = runs_directory
        self._versions: dict[str, list[tuple[str, str]] | str] = {}

    def reason(self, folder: Path) -> str | None:
        """Why a set-aside folder stays; `None` when nothing refers to it. Call it under its run's lease lock."""
        if is_held(folder.parent):
            return f"{folder.parent.name} is running"
        place = os.path.realpath(folder)
        for path, reason in self._uses.items():
            if path == place or path.startswith(place + os.sep):
                return reason
        return self._registered(folder)

    def _registered(self, folder: Path) -> str | None:
        match = _SET_ASIDE.fullmatch(folder.name)
        assert match is not None
        if not match[1].startswith(("export", "quantized")):
            return None
        versions = self._versions_of(self._configs[folder.parent])
        if isinstance(versions, str):
            return versions
        # By fingerprint: the registered place is that of the run's newest output, and may be of before a move.
        return next((f"{label} is registered with it" for label, mark in versions if mark[:8] == match[2]), None)

    def _versions_of(self, config_file: Path) -> list[tuple[str, str]] | str:
        """(label, fingerprint) of the weights of all versions in a run's registry, or why they are not known."""
        try:
            config = load(str(config_file), RunConfig)
        except CherryError as error:
            return f"its run's registry is not known: {error}"
        key = config.tracking.model_dump_json()
        if key not in self._versions:
            try:
                found = connect(config.tracking, str(self._runs_directory)).registry.versions()
            except CherryError as error:
                self._versions[key] = f"its run's registry could not be asked: {error}"
            else:
                self._versions[key] = [
                    (f"{version.name} v{version.version}", version.tags.get(f"{step}_fingerprint", ""))
                    for version in found
                    for step in ("export", "quantize")
                ]
        return self._versions[key]


def _texts(values: Any) -> Iterator[str]:
    """Every text in nested values."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)
