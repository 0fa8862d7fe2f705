"""Judgement of quantized weights: what they cost beside the weights they were made from, and whether that is allowed.

Loss, divergence and agreement are measured on the same held-out documents (cherry/scoring.py), with one-sided bounds
from the spread between documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from anything.statistics.compare import Comparison, Mean, compare, mean_of
from tasks.run_config import RunConfig

ESTIMATES = ("quantized_dnll", "quantized_kl", "quantized_top1")
BOUNDS = ("quantized_dnll_upper", "quantized_kl_upper", "quantized_top1_lower")


def pairs(score: Mapping[str, Any], key: str = "nll") -> dict[str, tuple[float, int]]:
    """One of a score's sums, and the scored tokens, by document."""
    return {document["id"]: (document[key], document["tokens"]) for document in score["documents"]}


def judge_quantized(
    config: RunConfig,
    plain: Mapping[str, Any],
    quantized: Mapping[str, Any],
    *,
    milder: str | None = None,
    closer: str | None = None,
) -> dict[str, Any]:
    """Figures, verdict and a sentence, under the names that evaluation.json has for them.

    The weights pass when the upper bound of their loss difference is at most `quantize.max_dnll`, that of their
    divergence at most `quantize.max_kl`, and the lower bound of their agreement at least `quantize.min_top1`; so too
    few documents cannot pass them.

    Args:
        plain: scores of the weights that they were made from, as `cherry.scoring` writes them.
        quantized: scores beside those as reference.
        milder: the format to propose where they cost too much; `None` where there is none.
        closer: the method to propose before that, which rounds in the same format at less cost.
    """
    evaluation = config.evaluate
    rules: dict[str, Any] = {
        "confidence": evaluation.confidence,
        "bootstrap_samples": evaluation.bootstrap_samples,
        "seed": evaluation.seed,
    }
    cost = compare(pairs(plain), pairs(quantized), margin=config.quantize.max_dnll, **rules)
    divergence = mean_of(pairs(quantized, "kl"), **rules)
    agreement = mean_of(pairs(quantized, "agreed"), **rules)
    broken = _broken(config, cost, divergence, agreement)
    return {
        "quantized_vs_candidate": asdict(cost),
        "quantized_dnll": cost.difference,
        "quantized_dnll_upper": cost.upper_one_sided,
        "quantized_kl": divergence.mean,
        "quantized_kl_upper": divergence.upper,
        "quantized_top1": agreement.mean,
        "quantized_top1_lower": agreement.lower,
        "quantized_passed": not broken,
        "quantized_reason": _reason(config, broken, cost, divergence, agreement, _proposal(milder, closer)),
        "quantized_bits_per_byte": quantized["bits_per_byte"],
    }


def _proposal(milder: str | None, closer: str | None) -> str:
    first = "" if closer is None else f"quantize.method={closer} rounds in the same format at less cost. "
    return first + ("Deploy the export" if milder is None else f"The next milder is quantize.format={milder}")


def _broken(config: RunConfig, cost: Comparison, divergence: Mean, agreement: Mean) -> dict[str, bool]:
    """Keys whose limit the bounds do not keep, and whether the estimate itself is beyond it."""
    limits = config.quantize
    kept = {
        "max_dnll": (cost.not_worse, cost.difference > limits.max_dnll),
        "max_kl": (divergence.upper <= limits.max_kl, divergence.mean > limits.max_kl),
        "min_top1": (agreement.lower >= limits.min_top1, agreement.mean < limits.min_top1),
    }
    return {key: surely for key, (passed, surely) in kept.items() if not passed}


def _reason(
    config: RunConfig,
    broken: Mapping[str, bool],
    cost: Comparison,
    divergence: Mean,
    agreement: Mean,
    proposal: str,
) -> str:
    """A sentence on what quantization costs, and what to do where that is too much."""
    limits, confidence = config.quantize, 100 * config.evaluate.confidence
    text = (
        f"quantization costs {cost.difference:+.4f} nats per token, at most {cost.upper_one_sided:+.4f} "
        f"({confidence:.4g} % one-sided, {cost.documents} documents); KL {divergence.mean:.4f}, at most "
        f"{divergence.upper:.4f}; the likeliest token is the same for {agreement.mean:.1%}, at least "
        f"{agreement.lower:.1%}"
    )
    if not broken:
        return text
    text += "; " + ", ".join(f"quantize.{key} is {getattr(limits, key):.4g}" for key in broken)
    if any(broken.values()):
        return f"{text}. {proposal}"
    return (
        f"{text}. These documents are too few to decide: they can show a difference from "
        f"{cost.minimum_detectable_effect:.4f} up. Raise evaluate.documents or data.heldout_fraction"
    )
