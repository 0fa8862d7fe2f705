"""Loss-spike detection: whether an optimizer step is taken or skipped, by its loss and gradient norm.

The rule is that of OLMo 2 (arXiv 2501.00656, and `SkipStepOptimizer` of its training code): a step is skipped when its
loss or its gradient norm lies more than 6 standard deviations above the mean of the last 128 steps, once half of them
are known. Here skipped steps stay out of the window. With them in it, the fourth outlier of a kind passes (its 6
deviations reach above it), and a run that has diverged would continue.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

WINDOW_STEPS = 128


@dataclass(frozen=True)
class Figures:
    """Loss (nats per token) and gradient norm of one optimizer step, before clipping."""

    loss: float
    grad_norm: float


class StepGuard:
    """Compares every step with the taken ones before it. Deterministic: ranks that see the same figures agree.

    Args:
        sigma: standard deviations above the mean that make a spike; `None` skips only values that are not finite.
    """

    def __init__(self, sigma: float | None, window: int = WINDOW_STEPS) -> None:
        self.sigma = sigma
        self.skipped = 0
        """Steps skipped since the run began."""
        self.consecutive_skips = 0
        """Steps skipped since the last one that was taken."""
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)

    def check_step(self, figures: Figures) -> str | None:
        """The reason to skip this step, as a text for people, or `None` to take it; counts it either way."""
        reason = self._reason(figures)
        if reason is None:
            self.consecutive_skips = 0
            self._losses.append(figures.loss)
            self._norms.append(figures.grad_norm)
        else:
            self.consecutive_skips += 1
            self.skipped += 1
        return reason

    def _reason(self, figures: Figures) -> str | None:
        for name, value, before in (
            ("loss", figures.loss, self._losses),
            ("gradient norm", figures.grad_norm, self._norms),
        ):
            if not math.isfinite(value):
                return f"{name} {value}"
            if self.sigma is not None and len(before) >= (before.maxlen or 0) // 2:
                limit = _limit(before, self.sigma)
                if value > limit:
                    return f"{name} {value:.4g} above {limit:.4g}, {self.sigma:g} sigma over the last {len(before)}"
        return None

    @property
    def last_loss(self) -> float | None:
        """The loss of the last step that was taken."""
        return self._losses[-1] if self._losses else None

    def reset_consecutive_skips(self) -> None:
        """Count consecutive skips from 0 again, after a rollback."""
        self.consecutive_skips = 0

    def state(self) -> dict[str, Any]:
        """The guard's state for a checkpoint: JSON values from which `restore` continues exactly."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._norms),
            "skipped": self.skipped,
            "in_a_row": self.consecutive_skips,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._losses.clear()
        self._norms.clear()
        self._losses.extend(state["losses"])
        self._norms.extend(state["grad_norms"])
        self.skipped, self.consecutive_skips = state["skipped"], state["in_a_row"]


def _limit(values: Iterable[float], sigma: float) -> float:
    """Mean + sigma * sample standard deviation, by exact sums, which no order of the values changes."""
    values = list(values)
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean + sigma * math.sqrt(variance)
