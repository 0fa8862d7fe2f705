"""Coverage of a calibration: how many tokens each routed expert was calibrated with, as a report has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from model.calibration.expert_rows import ExpertCoverage

_NAMED = 10


def describe_coverage(experts: Sequence[ExpertCoverage]) -> dict[str, Any]:
    """Coverage as JSON values.

    `expert_tokens_least` and `expert_tokens_mean` are of the tokens that were routed to an expert, `experts_borrowed`
    counts the experts that took others' tokens too, and `least_covered` names those with the fewest of their own.
    `coverage` has a row a layer: `tokens` and `borrowed` of each expert. A model without routed experts has none.
    """
    if not experts:
        return {"coverage": []}
    least = sorted(experts, key=lambda one: (one.tokens, one.layer, one.expert))
    return {
        "expert_tokens_least": least[0].tokens,
        "expert_tokens_mean": sum(one.tokens for one in experts) / len(experts),
        "experts_borrowed": sum(one.borrowed > 0 for one in experts),
        "least_covered": [asdict(one) for one in least[:_NAMED]],
        "coverage": [
            {
                "layer": layer,
                "tokens": [one.tokens for one in experts if one.layer == layer],
                "borrowed": [one.borrowed for one in experts if one.layer == layer],
            }
            for layer in sorted({one.layer for one in experts})
        ],
    }


def calibration_line(method: str, calibration: Mapping[str, Any]) -> str:
    """A line for people on a report's calibration: tokens, and the expert that saw the fewest."""
    text = f"calibrated by {method} with {calibration['tokens']:,} tokens"
    if not calibration["coverage"]:
        return f"{text}; the model has no routed experts"
    least = calibration["least_covered"][0]
    borrowed = calibration["experts_borrowed"]
    return (
        f"{text}: an expert saw {calibration['expert_tokens_mean']:,.0f} on average, at least {least['tokens']:,} "
        f"(layer {least['layer']}, expert {least['expert']}); {borrowed} took others' tokens too"
    )
