"""Digest of source files, by which code on two hosts, or of two runs, is told to be the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path


def source_digest(root: Path, sources: Sequence[str]) -> str:
    """SHA-256 over names and contents of Python files: those given, and all below the folders given.

    Args:
        sources: paths below `root`; what has a `!` before it is left out. A name that does not exist counts as empty.
    """
    hasher = hashlib.sha256()
    for path in sorted(source_files(root, sources)):
        content = path.read_bytes()
        hasher.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return hasher.hexdigest()


def source_files(root: Path, sources: Sequence[str]) -> set[Path]:
    """Python files that `source_digest` reads."""
    files: set[Path] = set()
    left_out: set[Path] = set()
    for source in sources:
        path = root / source.removeprefix("!")
        found = path.rglob("*.py") if path.is_dir() else [path] if path.is_file() else []
        (left_out if source.startswith("!") else files).update(found)
    return files - left_out
