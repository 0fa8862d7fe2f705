"""Checks of what a flow needs, before a run directory, a tracked run or a server exists for it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from base import storage
from base.errors import CherryError, MissingFileError, OperationalError, directory_fault
from cherry.cluster import read_cluster
from cherry.data.corpus import list_files
from tasks.files.data_store import entries_folder
from tasks.files.places import check_writable
from tasks.overrides import run_directory
from tasks.processes.replicas import ServingDirectory
from tasks.providers.registry import find_provider, reservation_of
from tasks.run_config import RunConfig


def check_inputs(config: RunConfig) -> None:
    """Check that the cluster has the hosts, that what the config names is there, and where the run writes.

    Only what never succeeds is an error here: what cannot be asked now, like a store that does not answer, is left to
    the step that needs it, which tries again.

    Raises:
        MissingFileError: names every one that is missing, by its key.
        ConfigError: the cluster file breaks a rule, its provider is not installed, or it never has the hosts.
        StorageError: this user cannot write the run directory, the store beside it, or the checkpoints' directory.
    """
    _check_cluster(config)
    missing = []
    try:
        list_files(config.data.source)
    except MissingFileError as error:
        missing.append(str(error))
    except (CherryError, OSError):
        pass
    data = config.data
    named = {"data.tokenizer": data.tokenizer, "data.chat_template": data.chat_template, "init_from": config.init_from}
    missing += [f"{key} {uri}: nothing is there." for key, uri in named.items() if uri is not None and not _exists(uri)]
    directory = config.checkpoint.directory
    if directory is not None and storage.is_local(directory):
        fault = directory_fault(storage.local_path(directory))
        missing += [] if fault is None else [f"checkpoint.directory {directory}: {fault}."]
    if missing:
        raise MissingFileError(" ".join(missing))
    _check_places(config)


def check_serving(config: RunConfig) -> None:
    """Check what a release needs besides the model, like its port; see `ServingDirectory.check`.

    Raises:
        StorageError: this user cannot write the run directory.
    """
    _check_run_directory(config)
    ServingDirectory(config.runs_directory).check(config.serve.host, config.serve.port)


def _check_places(config: RunConfig) -> None:
    _check_run_directory(config)
    store, checkpoints = entries_folder(Path(run_directory(config)).parent), config.checkpoint.directory
    check_writable(store, "Runs share their prepared data there: make it writable, or set runs_directory=PATH.")
    if checkpoints is not None and storage.is_local(checkpoints):
        check_writable(Path(storage.local_path(checkpoints)), "Set checkpoint.directory to one that can be written.")


def _check_run_directory(config: RunConfig) -> None:
    directory = Path(run_directory(config))
    for place in (directory, directory / "lease.lock"):
        check_writable(place, "Make it writable, keep runs elsewhere (runs_directory=PATH), or set another name=NAME.")


def _check_cluster(config: RunConfig) -> None:
    reservation = reservation_of(config, read_cluster(config.cluster), run_directory(config), config.name)
    with suppress(OperationalError):
        find_provider(reservation.provider).check(reservation)


def _exists(uri: str) -> bool:
    """Whether there is a file or a folder at a URI; true when its store cannot tell."""
    try:
        return storage.exists(uri)
    except (CherryError, OSError):
        return True
