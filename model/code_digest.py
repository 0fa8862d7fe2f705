"""Digest of the source files that compute something: results of other code are not gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = Path(__file__).parent


def code_digest(parts: Iterable[str]) -> str:
    """SHA-256 over files and folders of this package.

    Args:
        parts: names below `model/`, like `numerics` or `moe.py`.
    """
    hasher = hashlib.sha256()
    roots = [_PACKAGE / part for part in parts]
    for path in sorted(path for root in roots for path in ([root] if root.is_file() else root.rglob("*.py"))):
        hasher.update(f"{path.relative_to(_PACKAGE)}\0".encode() + path.read_bytes())
    return hasher.hexdigest()
