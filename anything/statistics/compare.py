"""Statistics of an A/B comparison: paired bootstrap over two models' losses on the same documents, and a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit  # not scipy.stats, whose import takes a second

from base.errors import InvalidInputError

Verdict = Literal["better", "worse", "can't tell"]
Losses = Mapping[str, tuple[float, int]]
"""(sum of the negative log-likelihood in nats, number of scored tokens) by document id."""

# The usual power of a sample size calculation (Cohen 1988, section 2.4).
POWER = 0.8
MIN_DOCUMENTS = 10
"""Fewest documents for a verdict. With fewer, skewed differences (exponential ones, 600 simulations a size, measured
2026-11-28) made one of two equal models "better" in up to 8 % of comparisons, where 2.5 % are asked for."""
# Standard errors; finite, as infinity times a standard error of zero is no number.
_FAR = 1e9
# Resampled document numbers held at one time: 8 MiB of int64.
_DRAWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Comparison:
    """Candidate minus baseline in nats per token: below zero the candidate is better.

    `low` and `high` bound the difference two-sided, `upper_one_sided` from above alone, all at the asked confidence.
    """

    verdict: Verdict
    reason: str
    """A sentence for a person."""
    difference: float
    low: float
    high: float
    upper_one_sided: float
    not_worse: bool
    """`upper_one_sided` is at most the margin: the candidate loses less than what counts."""
    minimum_detectable_effect: float
    """A true difference of this size excludes zero from the interval in 80 % of such comparisons."""
    documents: int
    tokens: int
    baseline_loss: float
    candidate_loss: float


def compare(
    baseline: Losses, candidate: Losses, *, margin: float, confidence: float, bootstrap_samples: int, seed: int
) -> Comparison:
    """Comparison of two models on the documents that both scored.

    The difference is weighted by tokens: sum of the documents' differences over the sum of their tokens. The unit of
    sampling is the document, for tokens of one document are not independent, and both models' losses of a document stay
    together, so that what is hard for both cancels. `_Estimate` says how the interval is made.

    A difference up to `margin` counts as none. The verdict is

    - "better" when the whole interval is below zero and the difference is below -margin,
    - "worse" when the whole interval is above zero and the difference is above margin,
    - "can't tell" otherwise, and always below MIN_DOCUMENTS. The reason says whether the two are equivalent (the whole
      interval within the margin), differ surely but by no more than the margin, or whether more documents are needed.

    Args:
        baseline: losses of the model that is in use.
        candidate: losses of the model that would replace it.
        margin: nats per token, at least 0.
        confidence: confidence level of the interval and of the one-sided bound, like 0.95.
        bootstrap_samples: resamples to draw; a percentile at 95 % wants some 1,000 or more.
        seed: resampling seed: the same seed and documents give the same numbers, whatever their order.

    Raises:
        InvalidInputError: fewer than 2 documents in common, a document with different token counts (another tokenizer
            or another cut: not comparable), a loss that is not finite, or an argument out of its range.
    """
    _check_arguments(margin, confidence, bootstrap_samples)
    ids = _in_common(baseline, candidate)
    tokens = _tokens(ids, baseline, candidate)
    nll_baseline, nll_candidate = _nlls(ids, baseline, "baseline"), _nlls(ids, candidate, "candidate")
    delta = nll_candidate - nll_baseline
    total = int(tokens.sum())
    difference = float(delta.sum() / total)
    estimate = _Estimate.of(delta, tokens.astype(np.float64), bootstrap_samples, seed)
    tail = (1 - confidence) / 2
    low, high = estimate.bound(tail), estimate.bound(1 - tail)
    upper = estimate.bound(confidence)
    effect = (high - low) / 2 + NormalDist().inv_cdf(POWER) * estimate.standard_error
    verdict, reason = _verdict(len(ids), difference, low, high, margin=margin, effect=effect)
    reason += f" ({100 * confidence:.4g} % interval [{low:+.4f}, {high:+.4f}] on {len(ids)} documents)."
    left_out = len(baseline.keys() ^ candidate.keys())
    if left_out:
        reason += f" Left out: {left_out} documents that only one model scored."
    return Comparison(
        verdict=verdict,
        reason=reason,
        difference=difference,
        low=low,
        high=high,
        upper_one_sided=upper,
        not_worse=upper <= margin,
        minimum_detectable_effect=effect,
        documents=len(ids),
        tokens=total,
        baseline_loss=float(nll_baseline.sum() / total),
        candidate_loss=float(nll_candidate.sum() / total),
    )


@dataclass(frozen=True)
class Mean:
    """Mean per token of what was summed over documents; bounds as in `Comparison`, each one-sided at the confidence."""

    mean: float
    lower: float
    upper: float
    documents: int
    tokens: int


def mean_of(sums: Losses, *, confidence: float, bootstrap_samples: int, seed: int) -> Mean:
    """Mean per token, with bounds from the spread between documents; arguments and errors as of `compare`."""
    _check_arguments(0.0, confidence, bootstrap_samples)
    ids = _in_common(sums, sums)
    tokens, values = _tokens(ids, sums, sums), _nlls(ids, sums, "model")
    estimate = _Estimate.of(values, tokens.astype(np.float64), bootstrap_samples, seed)
    lower, upper = estimate.bound(1 - confidence), estimate.bound(confidence)
    return Mean(float(values.sum() / tokens.sum()), lower, upper, len(ids), int(tokens.sum()))


def _in_common(baseline: Losses, candidate: Losses) -> list[str]:
    """Ids of the documents that both models scored, sorted."""
    ids = sorted(baseline.keys() & candidate.keys())
    if len(ids) < 2:
        raise InvalidInputError(
            f"a comparison needs at least 2 documents that both models scored, got {len(ids)} (baseline "
            f"{len(baseline)}, candidate {len(candidate)}). Score both on the same held-out documents."
        )
    return ids


def _check_arguments(margin: float, confidence: float, bootstrap_samples: int) -> None:
    if not 0 <= margin < float("inf"):
        raise InvalidInputError(f"margin must be a finite number of nats per token, at least 0, got {margin}.")
    if not 0.5 < confidence < 1:
        raise InvalidInputError(f"confidence must be above 0.5 and below 1, got {confidence}.")
    if bootstrap_samples < 2:
        raise InvalidInputError(f"bootstrap_samples must be at least 2, better 1,000 or more, got {bootstrap_samples}.")


def _tokens(ids: list[str], baseline: Losses, candidate: Losses) -> NDArray[np.int64]:
    """Token count of each document, equal for both models."""
    for name in ids:
        ours, theirs = baseline[name][1], candidate[name][1]
        if ours != theirs:
            raise InvalidInputError(
                f"document {name!r} has {ours} tokens for the baseline and {theirs} for the candidate; losses per "
                "token compare only under one tokenizer and one cut. Score both models on the same prepared data."
            )
        if ours < 1:
            raise InvalidInputError(f"document {name!r} must have at least 1 scored token, got {ours}.")
    return np.array([baseline[name][1] for name in ids], dtype=np.int64)


def _nlls(ids: list[str], losses: Losses, side: str) -> NDArray[np.float64]:
    values = np.array([losses[name][0] for name in ids], dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        raise InvalidInputError(
            f"the {side}'s loss must be finite, got {values[wrong[0]]} for document {ids[wrong[0]]!r} "
            f"({wrong.size} of {len(ids)} documents). The model or its weights are broken."
        )
    return values


@dataclass(frozen=True)
class _Estimate:
    """A token-weighted mean difference with what its confidence bounds are made of.

    An interval is the wider end, on each side, of two:

    - Student's t around the jackknife's standard error of the ratio (Miller 1974), with Kish's effective number of
      documents, less one, as degrees of freedom: right for few documents, also where a few hold most of the tokens;
    - the bootstrap-t (Efron and Tibshirani 1993, section 12.5), whole documents drawn with replacement: follows skew.
    """

    difference: float
    standard_error: float
    degrees: float
    """Degrees of freedom of Student's t."""
    studentized: NDArray[np.float64]
    """(difference - this difference) / standard error in each bootstrap resample."""

    @classmethod
    def of(cls, delta: NDArray[np.float64], tokens: NDArray[np.float64], samples: int, seed: int) -> _Estimate:
        difference, error = _ratio_and_error(delta, tokens)
        generator = np.random.default_rng(seed)
        documents = len(delta)
        rows = max(1, _DRAWS_AT_ONCE // documents)  # drawn some at a time, to bound the memory
        drawn = (
            generator.integers(documents, size=(min(rows, samples - start), documents))
            for start in range(0, samples, rows)
        )
        studentized = [_studentized(*_ratio_and_error(delta[some], tokens[some]), float(difference)) for some in drawn]
        effective = tokens.sum() ** 2 / (tokens**2).sum()
        return cls(float(difference), float(error), max(1.0, float(effective) - 1), np.concatenate(studentized))

    def bound(self, quantile: float) -> float:
        """Confidence bound in nats per token: below 0.5 the lower of the two methods' bounds, else the higher."""
        student = self.difference + stdtrit(self.degrees, quantile) * self.standard_error
        bootstrap = self.difference - np.quantile(self.studentized, 1 - quantile) * self.standard_error
        return float(min(student, bootstrap) if quantile < 0.5 else max(student, bootstrap))


def _ratio_and_error(
    delta: NDArray[np.float64], tokens: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of delta over sum of tokens along the last axis, and the jackknife's standard error of that ratio."""
    documents, total = delta.shape[-1], tokens.sum(axis=-1, keepdims=True)
    ratio = delta.sum(axis=-1, keepdims=True) / total
    left_out = (delta - ratio * tokens) / (total - tokens)  # how far the ratio moves without each document
    return ratio[..., 0], np.sqrt((documents - 1) / documents * (left_out**2).sum(axis=-1))


def _studentized(ratio: NDArray[np.float64], error: NDArray[np.float64], difference: float) -> NDArray[np.float64]:
    """Distance from `difference` in standard errors; a resample without spread counts as infinitely far, or as none."""
    far = np.sign(ratio - difference) * _FAR
    return np.where(error > 0, (ratio - difference) / np.where(error > 0, error, 1.0), far)


def _verdict(
    documents: int, difference: float, low: float, high: float, *, margin: float, effect: float
) -> tuple[Verdict, str]:
    if documents < MIN_DOCUMENTS:
        return "can't tell", f"{documents} documents are too few for a verdict, which takes {MIN_DOCUMENTS}"
    size = f"{abs(difference):.4f} nats per token"
    if high < 0 and difference < -margin:
        return "better", f"the candidate's loss is {size} lower"
    if low > 0 and difference > margin:
        return "worse", f"the candidate's loss is {size} higher"
    if low == high == 0:
        return "can't tell", "the two have the same loss on every document"
    if -margin <= low and high <= margin:
        return "can't tell", f"the two are equivalent within the margin of {margin:.4g} nats per token"
    if high < 0 or low > 0:
        direction = "lower" if high < 0 else "higher"
        return "can't tell", f"the candidate's loss is {size} {direction}, which is within the margin of {margin:.4g}"
    return "can't tell", f"the interval includes zero; these documents can show a difference from {effect:.4f} up"
