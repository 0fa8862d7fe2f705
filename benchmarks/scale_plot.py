"""Plots the time of a training step over sequence length, experts and micro-batch.

    python -m benchmarks.train_step --scale --output benchmarks/results/scale.json
    python -m benchmarks.scale_plot [ROWS] [PICTURE]

The dashed line is the expectation from sizes alone: the optimizer's bytes at the bandwidth of a large copy, and the
rest of the base shape's step times the ratio of FLOPs.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.train_step import SIZES
from model.model_config import ModelConfig

RESULTS = Path(__file__).with_name("results")
TOKENS = 16_384
# 30 bytes a parameter in AdamW and the norm, at an H200's copy (both by benchmarks.step_parts).
OPTIMIZER_BYTES, BYTES_A_MS = 30, 4.16e9


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "scale.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else RESULTS / "scale.png"
    rows = [row for row in json.loads(source.read_text()) if row["impl"] == "cherry" and "failed" not in row]
    keys, batch, length = SIZES[rows[0]["size"]]
    own = (batch, length, keys["n_routed_experts"])
    shape = {(row["batch"], row["length"], row["experts"]): row for row in rows}
    base = shape[own]
    by_length = [row for row in rows if row["batch"] * row["length"] == TOKENS and row["experts"] == own[2]]
    by_experts = [row for row in rows if (row["batch"], row["length"]) == own[:2]]
    by_batch = [row for row in rows if (row["length"], row["experts"]) == own[1:]]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    panels = [
        (f"sequence length, {TOKENS:,} tokens a step", "length", by_length),
        ("routed experts, 6 a token", "experts", by_experts),
        (f"micro-batch of {length:,} tokens", "batch", by_batch),
    ]
    for axis, (title, key, chosen) in zip(axes, panels, strict=True):
        chosen = sorted({row[key]: row for row in chosen}.values(), key=lambda row: row[key])
        at = [row[key] for row in chosen]
        axis.plot(at, [row["step_ms"] for row in chosen], "o-", label="measured")
        axis.plot(
            at, [by_sizes(row, base, keys) for row in chosen], "--", color="grey", label="by FLOPs and parameters"
        )
        axis.set(title=title, ylabel="ms a step", ylim=(0, None), xscale="log")
        axis.set_xticks(at, [f"{value:,}" for value in at])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{base['gpu']}, {base['precision']}, torch {base['versions']['torch']}, {base['date']}")
    figure.savefig(target, dpi=110)


def by_sizes(row: dict, base: dict, keys: dict) -> float:
    """Expected milliseconds of this row's step, extrapolated from the step at the base shape."""
    fixed, own = (OPTIMIZER_BYTES * shape["parameters"] / BYTES_A_MS for shape in (base, row))
    return own + (base["step_ms"] - fixed) * flops(row, keys) / flops(base, keys)


def flops(row: dict, keys: dict) -> float:
    """FLOPs of a step of this row's shape."""
    config = ModelConfig.model_validate({**keys, "n_routed_experts": row["experts"]})
    return row["batch"] * row["length"] * config.flops_per_token(row["length"])


if __name__ == "__main__":
    main()
