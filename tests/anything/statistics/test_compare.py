"""The comparison's statistics against known answers, simulation, and the symmetries that it must keep."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anything.statistics.compare import Comparison, compare, mean_of
from base.errors import InvalidInputError

Losses = dict[str, tuple[float, int]]


def run(
    baseline: Losses,
    candidate: Losses,
    *,
    margin: float = 0.0,
    confidence: float = 0.95,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> Comparison:
    return compare(
        baseline,
        candidate,
        margin=margin,
        confidence=confidence,
        bootstrap_samples=bootstrap_samples,
        seed=seed,
    )


def simulate(
    generator: np.random.Generator, *, documents: int, effect: float, noise: float = 0.2
) -> tuple[Losses, Losses]:
    """Documents of 20 to 200 tokens; the candidate's loss per token is `effect` higher, give or take `noise`."""
    tokens = generator.integers(20, 200, size=documents)
    difficulty = generator.normal(3.0, 0.8, size=documents)
    delta = effect + generator.normal(0.0, noise, size=documents)
    baseline = {f"d{i}": (float(difficulty[i] * tokens[i]), int(tokens[i])) for i in range(documents)}
    candidate = {f"d{i}": (float((difficulty[i] + delta[i]) * tokens[i]), int(tokens[i])) for i in range(documents)}
    return baseline, candidate


def shifted(losses: Losses, nats_per_token: float) -> Losses:
    return {name: (nll + nats_per_token * tokens, tokens) for name, (nll, tokens) in losses.items()}


def test_losses_are_weighted_by_tokens() -> None:
    result = run({"a": (30.0, 10), "b": (40.0, 30)}, {"a": (20.0, 10), "b": (60.0, 30)})
    assert result.baseline_loss == pytest.approx(70 / 40)
    assert result.candidate_loss == pytest.approx(80 / 40)
    assert result.difference == pytest.approx(10 / 40)
    assert (result.documents, result.tokens) == (2, 40)
    # The jackknife of two documents: what the ratio becomes without each of them, -1 and 2/3, apart from 1/4.
    error = math.sqrt(1 / 2 * (((-10 - 0.25 * 10) / 30) ** 2 + ((20 - 0.25 * 30) / 10) ** 2))
    student = 12.706204736 * error  # the 97.5 % point of Student's t with one degree of freedom
    assert result.low <= 0.25 - student * (1 - 1e-9)
    assert result.high >= 0.25 + student * (1 - 1e-9)
    assert result.verdict == "can't tell"


def test_a_constant_shift_is_known_exactly() -> None:
    baseline, _ = simulate(np.random.default_rng(0), documents=40, effect=0.0)
    result = run(baseline, shifted(baseline, -0.25))
    assert result.verdict == "better"
    assert [result.difference, result.low, result.high, result.upper_one_sided] == pytest.approx([-0.25] * 4)
    assert result.minimum_detectable_effect == pytest.approx(0.0, abs=1e-9)
    assert "0.2500 nats per token lower" in result.reason


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    trials = 400
    covered = bounded = 0
    for seed in range(trials):
        result = run(*simulate(generator, documents=100, effect=0.05), seed=seed, bootstrap_samples=600)
        covered += result.low <= 0.05 <= result.high
        bounded += result.upper_one_sided >= 0.05
    # Four standard errors of a proportion at 0.95 in 400 trials are 0.044.
    assert abs(covered / trials - 0.95) < 0.044
    assert abs(bounded / trials - 0.95) < 0.044


@pytest.mark.parametrize("documents", [2, 3, 5, 10, 20, 50])
@pytest.mark.parametrize("spread", ["even", "few hold most tokens"])
def test_equal_models_are_told_apart_no_more_often_than_asked(documents: int, spread: str) -> None:
    generator = np.random.default_rng(documents)
    trials = 800
    wrong = {"better": 0, "worse": 0, "can't tell": 0}
    excluded = passed = 0
    for seed in range(trials):
        if spread == "even":
            tokens = generator.integers(20, 200, size=documents)
        else:
            tokens = np.maximum(1, generator.lognormal(4.0, 1.2, size=documents)).astype(int)
        delta = generator.normal(0.0, 0.2, size=documents) * tokens
        baseline = {f"d{i}": (3.0 * tokens[i], int(tokens[i])) for i in range(documents)}
        candidate = {f"d{i}": (3.0 * tokens[i] + delta[i], int(tokens[i])) for i in range(documents)}
        result = run(baseline, candidate, seed=seed, bootstrap_samples=300)
        wrong[result.verdict] += 1
        excluded += not result.low <= 0.0 <= result.high
        passed += result.not_worse  # than by less than nothing, which is what it costs
    # Four standard errors of a proportion at 0.025 in 800 trials are 0.022; of one at 0.05, 0.031.
    assert wrong["better"] / trials < 0.025 + 0.022
    assert wrong["worse"] / trials < 0.025 + 0.022
    assert excluded / trials < 0.05 + 0.031
    assert passed / trials < 0.05 + 0.031


def test_below_ten_documents_there_is_no_verdict() -> None:
    baseline, _ = simulate(np.random.default_rng(13), documents=10, effect=0.0)
    assert run(baseline, shifted(baseline, -2.0)).verdict == "better"
    nine = dict(list(baseline.items())[:9])
    result = run(nine, shifted(nine, -2.0))
    assert result.verdict == "can't tell"
    assert "9 documents are too few" in result.reason
    assert "takes 10" in result.reason


def test_pairing_finds_what_the_spread_between_documents_would_hide() -> None:
    baseline, candidate = simulate(np.random.default_rng(2), documents=200, effect=-0.02, noise=0.05)
    spread = np.std([nll / tokens for nll, tokens in baseline.values()]) / math.sqrt(200)
    assert spread > 0.04  # unpaired, 0.02 would be half a standard error
    assert run(baseline, candidate).verdict == "better"


def test_the_minimum_detectable_effect_is_found_in_80_percent_of_simulations() -> None:
    generator = np.random.default_rng(3)
    effect = run(*simulate(generator, documents=150, effect=0.0), bootstrap_samples=4000).minimum_detectable_effect
    trials = 400
    found = sum(
        run(*simulate(generator, documents=150, effect=effect), seed=seed, bootstrap_samples=600).verdict == "worse"
        for seed in range(trials)
    )
    # The effect is itself an estimate (some 6 % off at 150 documents, so 0.05 of power), the count 0.02.
    assert abs(found / trials - 0.80) < 0.09


def test_swapping_the_two_turns_every_sign() -> None:
    baseline, candidate = simulate(np.random.default_rng(4), documents=60, effect=-0.2)
    forth, back = run(baseline, candidate), run(candidate, baseline)
    assert (forth.verdict, back.verdict) == ("better", "worse")
    assert [back.difference, back.low, back.high] == pytest.approx([-forth.difference, -forth.high, -forth.low])
    assert back.minimum_detectable_effect == pytest.approx(forth.minimum_detectable_effect)
    assert (back.baseline_loss, back.candidate_loss) == (forth.candidate_loss, forth.baseline_loss)


def test_neither_the_order_of_documents_nor_a_second_call_changes_anything() -> None:
    baseline, candidate = simulate(np.random.default_rng(5), documents=60, effect=0.01)
    backwards = dict(reversed(candidate.items()))
    assert run(baseline, candidate) == run(baseline, candidate) == run(baseline, backwards)
    assert run(baseline, candidate) != run(baseline, candidate, seed=1)


def test_one_model_against_itself_cannot_be_told() -> None:
    baseline, _ = simulate(np.random.default_rng(6), documents=30, effect=0.0)
    result = run(baseline, dict(baseline))
    assert result.verdict == "can't tell"
    assert "the same loss on every document" in result.reason
    assert (result.difference, result.low, result.high) == (0.0, 0.0, 0.0)
    assert result.not_worse


def test_a_sure_difference_within_the_margin_is_equivalence() -> None:
    baseline, candidate = simulate(np.random.default_rng(7), documents=100, effect=0.004, noise=0.005)
    assert run(baseline, candidate).verdict == "worse"
    result = run(baseline, candidate, margin=0.01)
    assert result.low > 0
    assert result.verdict == "can't tell"
    assert "equivalent within the margin of 0.01" in result.reason
    assert result.not_worse


@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_must_exceed_the_margin_to_count(sign: int) -> None:
    baseline, candidate = simulate(np.random.default_rng(8), documents=100, effect=0.1 * sign, noise=0.1)
    sure = run(baseline, candidate)
    assert sure.verdict == ("worse" if sign > 0 else "better")
    # Between the difference and the interval's far end: surely not zero, but maybe no more than the margin.
    margin = (abs(sure.difference) + max(abs(sure.low), abs(sure.high))) / 2
    result = run(baseline, candidate, margin=margin)
    assert result.verdict == "can't tell"
    assert "within the margin" in result.reason
    assert "equivalent" not in result.reason


def test_not_worse_holds_the_one_sided_bound_against_the_margin() -> None:
    baseline, candidate = simulate(np.random.default_rng(9), documents=100, effect=0.0, noise=0.1)
    bound = run(baseline, candidate).upper_one_sided
    assert 0 < bound < run(baseline, candidate).high
    assert run(baseline, candidate, margin=bound * 1.001).not_worse
    assert not run(baseline, candidate, margin=bound * 0.999).not_worse


def test_too_few_documents_say_what_could_have_been_seen() -> None:
    baseline, candidate = simulate(np.random.default_rng(10), documents=10, effect=-0.01)
    result = run(baseline, candidate)
    assert result.verdict == "can't tell"
    assert "includes zero" in result.reason
    assert f"{result.minimum_detectable_effect:.4f}" in result.reason


def test_only_common_documents_are_compared_and_the_rest_is_counted() -> None:
    baseline, candidate = simulate(np.random.default_rng(11), documents=30, effect=-0.2)
    whole = run(baseline, candidate)
    result = run({**baseline, "only-here": (1e6, 5)}, {**candidate, "only-there": (1e6, 5)})
    assert (result.difference, result.documents) == (whole.difference, 30)
    assert "2 documents that only one model scored" in result.reason


def test_more_resamples_than_fit_at_once_are_drawn_in_parts() -> None:
    baseline, candidate = simulate(np.random.default_rng(12), documents=3000, effect=0.01)
    once = run(baseline, candidate, bootstrap_samples=300)
    many = run(baseline, candidate, bootstrap_samples=1000)  # 3 million draws, three parts
    assert many.low == pytest.approx(once.low, abs=2e-3)
    assert many.high == pytest.approx(once.high, abs=2e-3)


@pytest.mark.parametrize(
    ("baseline", "candidate", "message"),
    [
        ({"a": (1.0, 2)}, {"a": (1.0, 2)}, "at least 2 documents"),
        ({"a": (1.0, 2), "b": (1.0, 2)}, {"c": (1.0, 2), "d": (1.0, 2)}, "got 0"),
        ({"a": (1.0, 2), "b": (1.0, 2)}, {"a": (1.0, 2), "b": (1.0, 3)}, "'b' has 2 tokens .* and 3"),
        ({"a": (1.0, 2), "b": (0.0, 0)}, {"a": (1.0, 2), "b": (0.0, 0)}, "'b' must have at least 1"),
        ({"a": (1.0, 2), "b": (1.0, 2)}, {"a": (1.0, 2), "b": (math.nan, 2)}, "candidate's loss must be finite"),
        ({"a": (math.inf, 2), "b": (1.0, 2)}, {"a": (1.0, 2), "b": (1.0, 2)}, "baseline's loss must be finite.*'a'"),
    ],
)
def test_what_cannot_be_compared_is_refused(baseline: Losses, candidate: Losses, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        run(baseline, candidate)


def test_arguments_out_of_range_are_refused() -> None:
    two: Losses = {"a": (1.0, 2), "b": (1.0, 2)}
    with pytest.raises(InvalidInputError, match="margin"):
        run(two, two, margin=-0.1)
    with pytest.raises(InvalidInputError, match="confidence"):
        run(two, two, confidence=95.0)
    with pytest.raises(InvalidInputError, match="bootstrap_samples"):
        run(two, two, bootstrap_samples=1)


def test_it_imports_nothing_heavy() -> None:
    program = (
        "import sys, anything.statistics.compare\n"
        "assert 'numpy' in sys.modules\n"
        "heavy = {'torch', 'fastapi', 'mlflow', 'prefect', 'scipy.stats'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])


def test_a_mean_s_bounds_are_one_sided_and_hold_as_often_as_they_say() -> None:
    """Sums of documents of unequal length, around a known mean."""
    below = above = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        tokens = generator.integers(20, 200, size=40)
        share = np.clip(0.9 + generator.normal(0.0, 0.05, size=40), 0.0, 1.0)
        sums = {str(i): (float(share[i] * tokens[i]), int(tokens[i])) for i in range(40)}
        found = mean_of(sums, confidence=0.95, bootstrap_samples=200, seed=0)
        assert found.mean == pytest.approx(sum(value for value, _ in sums.values()) / tokens.sum())
        assert (found.documents, found.tokens) == (40, tokens.sum())
        below += found.lower > 0.9
        above += found.upper < 0.9
    assert 0 < below <= 22, "about 5 %"
    assert 0 < above <= 22, "about 5 %"
    assert mean_of(sums, confidence=0.8, bootstrap_samples=200, seed=0).upper < found.upper
