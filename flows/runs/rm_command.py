"""`cherry rm`: a run's directory, removed after a list of what goes with it and of what refers to it.

Its runs in the tracker stay: they are the record of what was tried, and cost no disk to speak of. A registered version
stays too, without weights, and says so when it is used.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from base.config import load
from base.errors import CherryError, ConfigError, InvalidInputError, OperationalError, storage_errors
from flows.runs.directories import find_run
from flows.runs.status import is_held, read_values, served_from
from tasks.files.outputs import find_output
from tasks.lease import is_held as is_leased
from tasks.lease import locked
from tasks.providers.protocol import RESERVATION_FILE
from tasks.provision import release_hosts
from tasks.run_config import RunConfig
from tasks.tracking.connect import connect


@dataclass(frozen=True)
class Removal:
    """What `cherry rm` is about to remove, and what speaks against it."""

    directory: Path
    sizes: dict[str, int]
    """Bytes by file or directory of the run directory."""
    stays: list[str] = field(default_factory=list)
    """Sentences on what is not removed."""
    objections: list[str] = field(default_factory=list)
    """Sentences on what still needs the run."""

    def lines(self) -> list[str]:
        """The list for a person."""
        total = sum(self.sizes.values())
        shown = [f"  {_size(size):>10}  {name}" for name, size in self.sizes.items()]
        return [f"{self.directory}: {_size(total)}", *shown, *(f"  {line}" for line in self.stays)]


def remove(
    runs_directory: Path, name: str, *, force: bool, confirm: Callable[[list[str]], bool]
) -> tuple[Path, int] | None:
    """Remove a run, and return its directory and bytes; `None` when `confirm`, which gets the list, says no.

    Raises:
        MissingFileError: there is no such run.
        InvalidInputError: it is at work, or a link; or it is champion or served, without `force`.
        OperationalError: hosts that it holds could not be given back.
    """
    directory = find_run(runs_directory, name)
    found = look(directory)
    if is_held(directory):
        raise InvalidInputError(f"{directory} is being worked on. Stop that first (Ctrl-C, or cancel it in Prefect).")
    if found.objections and not force:
        raise InvalidInputError(f"{' '.join(found.objections)} `cherry rm {name} --force` removes it all the same.")
    if not confirm([*found.lines(), *found.objections]):
        return None
    with locked(directory), storage_errors(str(directory)):
        if is_leased(directory):
            raise InvalidInputError(f"{directory} is being worked on since a moment ago. Nothing was removed.")
        release_hosts(directory)
        if (directory / RESERVATION_FILE).exists():  # the only record of what it holds
            raise OperationalError(f"{directory}: its hosts were not given back, as the log says. Nothing was removed.")
        # Under another name first: a removal that is interrupted leaves no half of a run.
        gone = directory.with_name(f".{name}.removed-{uuid.uuid4().hex[:8]}")
        directory.rename(gone)
    with storage_errors(str(gone)):
        shutil.rmtree(gone)
    return directory, sum(found.sizes.values())


def look(directory: Path) -> Removal:
    """What removing a run directory would do.

    Raises:
        InvalidInputError: it is a link: what it points at may belong to somebody else.
    """
    if directory.is_symlink():
        raise InvalidInputError(f"{directory} is a link to {directory.resolve()}. Remove the link, or what it names.")
    sizes = {path.name: _bytes(path) for path in sorted(directory.iterdir())}
    stays, objections = _versions(directory)
    objections += [f"{server.version} is served from it at {server.url}." for server in served_from(directory)]
    links = [path.name for path in directory.iterdir() if path.is_symlink()]
    stays += [f"{name} is a link: what it points at stays." for name in links]
    return Removal(directory, sizes, [*stays, "Its runs in the tracker stay."], objections)


def _versions(directory: Path) -> tuple[list[str], list[str]]:
    """Sentences on the registered version of the run and the checkpoints elsewhere, and objections of the registry."""
    try:
        config = load(directory / "config.yaml", RunConfig)
    except CherryError:
        return ["Its config cannot be read, so the registry was not asked."], []
    elsewhere = config.checkpoint.directory
    stays = [] if elsewhere is None else [f"Its checkpoints in {elsewhere} stay."]
    registered = read_values(directory / "register.json")
    if not registered:
        return stays, []
    name, number = str(registered["name"]), int(registered["version"])
    stays.append(f"{name} v{number} refers to it, and will have no weights.")
    alias = config.register_model.champion_alias
    try:
        champion = connect(config.tracking, str(directory.parent)).registry.version(name, alias=alias)
    except (CherryError, ConfigError) as error:
        return stays, [f"The registry cannot say whether {name} v{number} is the {alias}: {error}"]
    if champion is None:
        return stays, []
    place = Path(find_output(champion.uri, champion.tags.get("export_fingerprint", ""), str(directory.parent)))
    own = champion.version == number or place.is_relative_to(directory.absolute())
    return stays, [f"{name} v{champion.version} is the {alias}."] if own else []


def _bytes(path: Path) -> int:
    """Bytes of a file or of the files in a directory, without following links."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += (Path(folder) / name).lstat().st_size
            except OSError:  # removed meanwhile
                continue
    return total


def _size(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
