"""Goodput: the fraction of wall-clock time that becomes progress under failures, and the best checkpoint interval.

Failures come at random at a constant rate (a Poisson process); the closed form extends
Daly's (Future Generation Computer Systems 22, 2006) by saves that are written in the background.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DAY_S = 86400.0


@dataclass(frozen=True)
class Reliability:
    """Failure rate of a run, and what a failure and a save cost; seconds."""

    failures_per_s: float
    """Failures per second of the whole job: any rank's ends the attempt."""
    restart_s: float
    """Seconds from a failure to the first new step: detection, restart, checkpoint read."""
    stall_s: float
    """Seconds for which a save stops training."""
    write_s: float
    """Seconds from the end of the stall until the checkpoint is committed: training continues meanwhile."""


def goodput(reliability: Reliability, interval_s: float) -> float:
    """Fraction of wall-clock time that becomes lasting progress, saving after every `interval_s` of training.

    Between two failures a job makes as many saves as are written in time: k of them need k (interval + stall) + write.
    Failures at rate f end uptime after an exponential time, so
    E[saves] = e^(-f write) / (e^(f (interval + stall)) - 1).
    A cycle takes 1/f of uptime, and a restart that is itself interrupted begins anew: together e^(f restart) / f.
    """
    rate = reliability.failures_per_s
    # A save that comes due before the last one is written waits for it, and training with it
    # (cherry/checkpoint/checkpointer.py).
    period = max(interval_s, reliability.write_s) + reliability.stall_s
    if rate * (period + reliability.restart_s + reliability.write_s) < 1e-12:
        return interval_s / period
    if rate * max(period, reliability.restart_s, reliability.write_s) > 500.0:
        return 0.0  # nothing lasts that long; exp would overflow
    saves = math.exp(-rate * reliability.write_s) / math.expm1(rate * period)
    return interval_s * saves * rate * math.exp(-rate * reliability.restart_s)


def best_interval_s(reliability: Reliability) -> float:
    """Seconds between saves of the largest goodput; a save must be written before the next one begins."""
    rate = reliability.failures_per_s
    lowest = max(reliability.write_s, reliability.stall_s, 1.0)
    if rate <= 0:
        return math.inf
    # Goodput is t / (e^(f (t + stall)) - 1) up to factors: rising, then falling. Young's value is close to its maximum.
    low, high = lowest, max(lowest, 20.0 * young_interval_s(reliability), 10.0)
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if goodput(reliability, left) < goodput(reliability, right):
            low = left
        else:
            high = right
    return (low + high) / 2


def young_interval_s(reliability: Reliability) -> float:
    """Seconds between saves by Young's first-order optimum, sqrt(2 stall / f) (Communications of the ACM 17, 1974)."""
    return math.sqrt(2 * reliability.stall_s / reliability.failures_per_s)
