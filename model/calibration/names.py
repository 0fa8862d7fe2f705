"""Names of the ways in which int4 weights are rounded, as configurations have them. Needs no torch."""

from __future__ import annotations

from model.numerics.formats import FORMATS

NEAREST = "nearest"
"""Each weight to the nearest value, without calibration."""
CALIBRATED = ("search", "gptq", "awq")
"""Methods that look at what the model computes on calibration tokens, with settings in model/calibration/method.py."""
BEST = "gptq"
"""The one that cost least of those measured (benchmarks/results/quantize_methods.jsonl)."""
METHODS = (NEAREST, *CALIBRATED)
DEFAULT_SEQUENCES = 128
"""Calibration sequences where no number of tokens is given: those of GPTQ's paper (arXiv 2210.17323, section 5)."""


def method_rule() -> str:
    """The rule for a method's name, for error messages."""
    return f"must be one of {', '.join(METHODS)}"


def misfit(method: str, format_name: str) -> str | None:
    """The rule that a method breaks with a format, `auto` too; `None` where they go together."""
    int4 = [name for name, entry in FORMATS.items() if entry.has_int4_groups]
    if method == NEAREST or format_name in int4:
        return None
    return (
        f"rounds int4 weights in groups, and the format {format_name} has none: take the format {' or '.join(int4)}, "
        f"or the method {NEAREST}"
    )
