"""Sizes and SHA-256 digests of a checkpoint's files, and the classification of write errors."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from base import storage
from base.errors import CheckpointError, CherryError, DiskFullError, StorageError, storage_errors

# A zip writer that fails with at most this much free space failed because the disk was full.
_FULL_BYTES = 64 << 20


def digest_own(target: str, names: Sequence[str], rank: int) -> dict[str, list[Any]]:
    """[size in bytes, SHA-256] of each file among `names` that this rank wrote; rank 0 adds the metadata file."""
    own = [name for name in names if name.startswith(f"__{rank}_")]
    return {name: _digest(storage.join(target, name)) for name in own + ([".metadata"] if rank == 0 else [])}


def _digest(uri: str) -> list[Any]:
    hasher, size = hashlib.sha256(), 0
    with storage.open_read(uri) as handle:
        while block := handle.read(1 << 22):
            hasher.update(block)
            size += len(block)
    return [size, hasher.hexdigest()]


def verify(uri: str, record: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Check a checkpoint's files against the sizes and digests in its commit record.

    With a group each rank checks a share of the files, and all ranks raise an error if any of them found one.

    Raises:
        CheckpointError: names every file that is corrupt, truncated or missing.
    """
    files: dict[str, list[Any]] = record.get("files", {})
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    broken: list[str] = []
    for name in sorted(files)[rank::ranks]:
        path = storage.join(uri, name)
        try:
            found = _digest(path)
        except CherryError as error:
            broken.append(str(error))
            continue
        if found != files[name]:
            shorter = found[0] != files[name][0]
            broken.append(
                f"{path}: " + (f"{found[0]} bytes, {files[name][0]} were committed" if shorter else "other content")
            )
    found_by: list[Any] = [broken]
    if group is not None:
        found_by = [None] * ranks
        dist.all_gather_object(found_by, broken, group=group)
    if everything := [line for lines in found_by for line in lines]:
        raise CheckpointError(
            "corrupt checkpoint:\n"
            + "\n".join(f"  {line}" for line in everything)
            + "\nRemove this step's directory to resume from the one before it."
        )


def as_storage_error(failure: BaseException, target: str) -> CherryError:
    """Error of this project's family for a failure to write a checkpoint to `target`."""
    if isinstance(failure, CherryError):
        return failure
    causes = list(getattr(failure, "failures", {}).values())  # a CheckpointException: (error, traceback) by rank
    errors = [cause[0] for cause in causes] or [failure]
    for error in errors:
        if isinstance(error, OSError):
            try:
                with storage_errors(target):
                    raise error
            except CherryError as known:
                return known
    # torch's zip writer has no error type for a full disk
    text = str(errors[0]).strip()
    from_writer = "PytorchStreamWriter failed" in text or "enforce fail at inline_container" in text
    if "No space left" in text or (from_writer and _is_full(target)):
        return DiskFullError(f"no space left while writing {target}: {text.splitlines()[0]}. Free some and run again.")
    return StorageError(f"could not write {target}: {text}")


def _is_full(target: str) -> bool:
    """True if a local disk is so full that a failed write must be due to it; the message alone does not say why."""
    if not storage.is_local(target):
        return False
    folder = Path(storage.local_path(target))
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free < _FULL_BYTES
