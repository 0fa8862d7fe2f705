"""Names that a run's figures have in the tracker: one table for the figures of step records and of summaries.

MLflow draws a group of charts for what stands before a slash, groups by name. A figure that does not change while a run
lasts would be a chart of equal bars, so it is a tag. The names of training's series are in cherry/train_record.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from cherry.train_record import THROUGHPUT, TRAIN

HEADLINE = "quality/heldout_bits_per_byte"
"""The figure that runs are compared by."""
FIGURES: dict[str, str] = {
    "heldout_bits_per_byte": HEADLINE,
    "heldout_loss": "quality/heldout_loss",
    "quantized_bits_per_byte": "quality/quantized_bits_per_byte",
    "quantized_loss": "quality/quantized_loss",
    "quantized_dnll": "quality/quantized_dnll",
    "quantized_dnll_upper": "quality/quantized_dnll_upper",
    "quantized_kl": "quality/quantized_kl",
    "quantized_kl_upper": "quality/quantized_kl_upper",
    "quantized_top1": "quality/quantized_top1",
    "quantized_top1_lower": "quality/quantized_top1_lower",
    "minimum_detectable_effect": "quality/minimum_detectable_effect",
    "rel_error_mean": "quality/quantized_rel_error_mean",
    "rel_error_max": "quality/quantized_rel_error_max",
    "heldout_window_bits_per_byte": "quality/heldout_window_bits_per_byte",
    "final_tokens_per_second": f"{THROUGHPUT}/tokens_per_second_mean",
    "tokens_per_second": f"{THROUGHPUT}/tokens_per_second_mean",
    "step_seconds_mean": f"{THROUGHPUT}/step_seconds_mean",
    "peak_memory_gib": f"{THROUGHPUT}/peak_memory_gib",
    "predicted_step_seconds": "plan/step_seconds",
    "predicted_tokens_per_second": "plan/tokens_per_second",
    "predicted_peak_memory_gib": "plan/peak_memory_gib",
    "predicted_goodput": "plan/goodput",
    "step_seconds_over_plan": "plan/measured_over_plan_step_seconds",
    "tokens_per_second_over_plan": "plan/measured_over_plan_tokens_per_second",
    "peak_memory_gib_over_plan": "plan/measured_over_plan_peak_memory_gib",
    "gpu_hours": "cost/gpu_hours",
    "percent": "release/percent",
    "requests": "release/requests",
    "errors": "release/errors",
    "median_ms": "release/median_ms",
}
"""Name in the tracker by figure. One that is not listed is in the group of its step."""
CONSTANTS = frozenset(
    {
        *("documents", "data_bytes", "bytes", "tokens", "sequences", "heldout_documents", "zlib_bits_per_byte"),
        *(
            "parameters",
            "steps",
            "world_size",
            "version",
            "quantized_bytes_ratio",
            "cores",
            "memory_gib",
            "disk_free_gib",
        ),
        *("baseline_loss", "baseline_bits_per_byte"),
    }
)
"""Figures that are tags."""
GROUPS = ("quality", TRAIN, THROUGHPUT, "cost", "plan", "seconds", "release")
"""Groups of charts, in the order in which a person looks at them."""
COLUMNS = (
    *("tags.`verdict`", f"metrics.`{HEADLINE}`", "tags.`baseline`"),
    *("metrics.`quality/quantized_dnll`", f"metrics.`{THROUGHPUT}/tokens_per_second_mean`"),
    *("params.`train.learning_rate`", "metrics.`seconds/train`"),
)
"""Columns of MLflow's table of runs that tell which run is better, under the names that its page has for them."""
_ELSEWHERE = frozenset(
    {
        *("loss_first", "loss_last", "final_heldout_window_loss", "final_skipped_steps", "final_rollbacks"),
        *("candidate_loss", "candidate_bits_per_byte"),
    }
)
"""Figures that the tracker has under another name: as points of a series, or as `quality/heldout_...`."""
# What MLflow's names of metrics may hold, less the slash, which groups.
_NOT_IN_A_NAME = re.compile(r"[^\w. -]")


class Tracked(NamedTuple):
    """Figures as a tracker takes them."""

    metrics: dict[str, float]
    tags: dict[str, str]


def tracked(figures: Mapping[str, Any], step: str) -> Tracked:
    """The figures of a step's record under their names in the tracker; those that are not numbers are left out."""
    numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
    # A yes or no is a tag of its own, like `became_champion`.
    sent = {key: value for key, value in numbers.items() if not isinstance(value, bool) and key not in _ELSEWHERE}
    metrics = {name_of(key, step): float(value) for key, value in sent.items() if key not in CONSTANTS}
    return Tracked(metrics, {key: _text(value) for key, value in sent.items() if key in CONSTANTS})


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def name_of(figure: str, step: str) -> str:
    """Name in the tracker of a step's figure."""
    return FIGURES.get(figure, f"{step}/{figure}")


def seconds_of(step: str) -> str:
    """Name in the tracker of a step's wall time, in seconds."""
    return f"seconds/{step}"


def cost_of(currency: str) -> str:
    """Name in the tracker of a run's cost: sums in two currencies are never bars of one chart."""
    return f"cost/{currency}"


def difference_of(baseline: str, figure: str) -> str:
    """Name in the tracker of a figure of a comparison; differences from two baselines are never bars of one chart.

    Args:
        baseline: label of the model compared with, like `cherry-tiny v2`.
        figure: `difference`, `low` or `high`, in nats per token.
    """
    return f"vs_{_NOT_IN_A_NAME.sub('_', baseline)}/{figure}"
