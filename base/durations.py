"""Durations as configurations write them: a number with a unit, like `90s` or `12h`."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, PositiveFloat, WithJsonSchema
from pydantic_core import PydanticCustomError

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
"""Seconds of each unit."""
_PATTERN = rf"^([0-9]+(?:\.[0-9]+)?) ?({'|'.join(UNITS)})$"
_LONGEST_D = 3650
# Python converts no longer text to a number, and a float holds none of more than 308 digits.
_LONGEST_TEXT = 100
DURATION_RULE = (
    f"must be a number above 0 with a unit, like 90min or 12h, and at most {_LONGEST_D}d; "
    f"units are {', '.join(UNITS)}, and without one it is seconds"
)


def duration_s(text: str) -> float | None:
    """Seconds of a duration with a unit, like `12h`; `None` when it is none, or not above 0."""
    found = re.fullmatch(_PATTERN, text) if len(text) <= _LONGEST_TEXT else None
    seconds = Fraction(found[1]) * UNITS[found[2]] if found is not None else Fraction(0)
    return float(seconds) if seconds > 0 else None


def duration_text(seconds: float) -> str:
    """A duration with the unit in which it reads best, like `12h`, and a minus sign where it is below 0."""
    sign, length = "-" if seconds < 0 else "", abs(seconds)
    unit = next((unit for unit in reversed(UNITS) if length >= UNITS[unit]), "s")
    return f"{sign}{length / UNITS[unit]:.3g}{unit}"


def _parsed(value: Any) -> Any:
    # What was read before is a number of seconds: a spec is written out, and read again.
    seconds = duration_s(value) if isinstance(value, str) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= _LONGEST_D * UNITS["d"]:
        raise PydanticCustomError("duration", "{rule}", {"rule": DURATION_RULE})
    return float(seconds)


Duration = Annotated[
    PositiveFloat,
    BeforeValidator(_parsed),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": _PATTERN}]}),
]
"""Type of a configuration's key that is a duration: a `float` of seconds, once it is read. A bare number is seconds."""
