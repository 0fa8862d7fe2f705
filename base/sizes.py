"""Sizes in bytes as configurations write them: a number, or a number with a decimal or a binary unit."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, PositiveInt, WithJsonSchema
from pydantic_core import PydanticCustomError

_DECIMAL = {f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T", "P"))}
_BINARY = {f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T", "P"), 1)}
UNITS = {**_DECIMAL, **_BINARY}
"""Bytes of each unit: KB, MB, ... are powers of 1000 (SI), KiB, MiB, ... powers of 1024 (IEC 80000-13)."""
_PATTERN = rf"^([0-9]+(?:\.[0-9]+)?) ?({'|'.join(UNITS)})$"
# Python converts no longer text to a number.
_LONGEST_TEXT = 100
SIZE_RULE = (
    "must be a whole number of bytes above 0, or a number with a unit, like 256MB (10^6 bytes each) or 256MiB (2^20); "
    f"units are {', '.join(UNITS)}"
)


def size_bytes(text: str) -> int | None:
    """Bytes of a size with a unit, like `256MB`; `None` when it is none, or not a whole number of bytes above 0."""
    found = re.fullmatch(_PATTERN, text) if len(text) <= _LONGEST_TEXT else None
    if found is None:
        return None
    size = Fraction(found[1]) * UNITS[found[2]]
    return int(size) if size > 0 and size.denominator == 1 else None


def _parsed(value: Any) -> Any:
    size = size_bytes(value) if isinstance(value, str) else value
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise PydanticCustomError("size", "{rule}", {"rule": SIZE_RULE})
    return size


Size = Annotated[
    PositiveInt,
    BeforeValidator(_parsed),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string", "pattern": _PATTERN}]}),
]
"""Type of a configuration's key that is a size: an `int` of bytes, once it is read."""
