"""The watch over steps: what silence is a hang, by a clock of the test's own."""

import pytest

from cherry.remote.step_watch import StepWatch


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def after_steps(clock, *seconds, least_s=30.0):
    """A watch that has seen a line, and one more after each of these times."""
    watch = StepWatch(least_s, clock)
    watch.progressed()
    for passed in seconds:
        clock.now += passed
        watch.progressed()
    return watch


@pytest.mark.parametrize(("steps", "limit"), [((1.0, 1.0, 2.0), 30.0), ((20.0, 22.0, 90.0), 66.0)])
def test_a_job_hangs_after_three_median_steps_but_never_before_the_least_time(clock, steps, limit):
    watch = after_steps(clock, *steps)
    clock.now += limit
    assert not watch.hangs()
    clock.now += 0.1
    assert watch.hangs()
    watch.progressed()
    assert not watch.hangs()


def test_nothing_hangs_before_the_first_step_and_the_second_has_more_time(clock):
    watch = StepWatch(30.0, clock)
    clock.now += 1e6
    assert not watch.hangs() and watch.limit_s is None and not watch.has_steps
    watch.progressed()
    clock.now += 599.0
    assert not watch.hangs() and watch.has_steps
    clock.now += 2.0
    assert watch.hangs()


def test_a_job_that_starts_again_has_steps_as_long_as_before(clock):
    watch = after_steps(clock, 1.0, 1.0)
    watch.begin()
    clock.now += 1e6
    assert not watch.hangs() and not watch.has_steps
    watch.progressed()
    clock.now += 31.0
    assert watch.hangs()


def test_an_evaluation_has_more_time_and_the_next_step_its_own(clock):
    watch = after_steps(clock, 1.0, 1.0)
    watch.busy("evaluation")
    clock.now += 599.0
    assert not watch.hangs()
    watch.busy(None)
    clock.now += 29.0
    assert not watch.hangs()
    clock.now += 2.0
    assert watch.hangs()
    watch.busy("checkpoint")
    clock.now += 601.0
    assert watch.hangs()
