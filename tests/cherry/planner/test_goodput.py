"""What failures cost: the closed form against a simulation of steps, saves, failures and restarts."""

from __future__ import annotations

import pytest

from benchmarks.goodput_simulation import simulate
from cherry.planner.goodput import DAY_S, Reliability, best_interval_s, goodput, young_interval_s

STEPS, SEEDS = 40_000, 6
# Failures a day, seconds of restart, stall and writing, of a step, and steps between saves.
CASES = [
    (0.12, 380.0, 0.05, 165.0, 17.4, 100),  # 671B on 256 GPUs
    (0.5, 380.0, 0.05, 165.0, 8.9, 200),  # on 1,024
    (8.0, 900.0, 2.0, 160.0, 17.0, 60),  # 16,384 GPUs of Llama 3's kind
    (8.0, 900.0, 160.0, 0.0, 17.0, 120),  # the same with saves in the foreground
    (60.0, 600.0, 5.0, 100.0, 10.0, 30),
    (8.0, 300.0, 2.0, 400.0, 10.0, 20),  # a save comes due before the last one is written
]


@pytest.mark.parametrize(("daily", "restart", "stall", "write", "step", "interval"), CASES)
def test_the_closed_form_is_within_three_percent_of_a_simulation(
    daily: float, restart: float, stall: float, write: float, step: float, interval: int
) -> None:
    costs = Reliability(daily / DAY_S, restart, stall, write)
    simulated = [simulate(costs, step, interval, STEPS, seed).goodput for seed in range(SEEDS)]
    assert goodput(costs, interval * step) == pytest.approx(sum(simulated) / SEEDS, rel=0.03)


def test_without_failures_only_stalls_cost() -> None:
    costs = Reliability(0.0, 300.0, 5.0, 60.0)
    assert goodput(costs, 95.0) == pytest.approx(0.95)
    outcome = simulate(costs, 1.0, 95, 950, seed=0)
    assert (outcome.failures, outcome.wall_s) == (0, 1000.0)


def test_a_job_that_fails_before_it_can_save_gets_nowhere() -> None:
    assert goodput(Reliability(1.0, 600.0, 5.0, 60.0), 3600.0) == 0.0


@pytest.mark.parametrize("daily", [0.1, 3.0, 50.0])
def test_the_best_interval_is_better_than_its_neighbours_and_near_youngs(daily: float) -> None:
    costs = Reliability(daily / DAY_S, 600.0, 5.0, 5.0)
    best = best_interval_s(costs)
    for factor in (0.7, 1.4):
        assert goodput(costs, best) > goodput(costs, factor * best)
    assert best == pytest.approx(young_interval_s(costs), rel=0.1)


def test_a_save_is_written_before_the_next_one_begins() -> None:
    assert best_interval_s(Reliability(1.0 / DAY_S, 600.0, 0.05, 500.0)) >= 500.0
