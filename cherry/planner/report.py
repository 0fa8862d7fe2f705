"""Owns how a plan is told in rows: by a terminal, Prefect's page or MLflow alike.

It knows nothing of any of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cherry.planner.hardware import GIB
from cherry.planner.plan import Plan
from cherry.planner.search import Layout

_SHOWN_SECONDS = 5e-4
"""Shorter parts of a step are left out."""


@dataclass(frozen=True)
class Row:
    """One figure."""

    name: str
    value: str
    share: float | None = None
    """Of its section's whole, for a bar."""
    note: str = ""


def headline(plan: Plan) -> str:
    """Where and how it would run."""
    work = plan.work
    axes = {"replicate": work.replicate, "shard": work.shard, "context": work.context, "expert": work.expert}
    layout = ", ".join(f"{axis} {size}" for axis, size in axes.items())
    micro = f"{work.accumulation} x {work.micro_sequences} sequences of {work.sequence_length:,} a rank"
    recompute = "full recompute" if work.recompute == "full" else "no recompute"
    return f"{work.ranks} x {work.gpu.name}: {layout}; {micro}; {work.precision}, {recompute}"


def sections_of(plan: Plan) -> list[tuple[str, list[Row]]]:
    """Titles and their rows."""
    memory = [
        (
            f"memory of {ranks.name}, GiB, at the peak ({ranks.peak_stage}); {ranks.usable / GIB:.1f} usable",
            [
                *(_gib(name, size, ranks.usable) for name, size in ranks.components.items() if size >= 2**20),
                _gib("all", ranks.total, ranks.usable),
            ],
        )
        for ranks in plan.memory
        if ranks is plan.worst or ranks.total != plan.worst.total
    ]
    return [*memory, ("a step, seconds", _step(plan)), ("speed", _speed(plan)), ("the run", _run(plan))]


def _gib(name: str, size: int, usable: int) -> Row:
    return Row(name, f"{size / GIB:.2f}", min(1.0, size / usable))


def _step(plan: Plan) -> list[Row]:
    step = plan.step
    rows = [Row(name, f"{s:.3f}", s / step.total) for name, s in step.busy.items() if s >= _SHOWN_SECONDS]
    rows += [
        Row(f"waiting: {name}", f"{s:.3f}", s / step.total) for name, s in step.exposed.items() if s >= _SHOWN_SECONDS
    ]
    hidden = sum(step.travelling.values()) - sum(s for name, s in step.exposed.items() if name != "host")
    rows.append(Row("all", f"{step.total:.3f}", None, f"communication hidden behind it: {max(0.0, hidden):.3f}"))
    return rows


def _speed(plan: Plan) -> list[Row]:
    step = plan.step
    return [
        Row("tokens/s/GPU", f"{step.tokens_per_s_gpu:,.0f}"),
        Row("tokens/s", f"{step.tokens_per_s:,.0f}"),
        Row("MFU, causal", f"{100 * step.mfu(causal=True):.1f} %", None, "attention counts half of the square"),
        Row("MFU, full", f"{100 * step.mfu(causal=False):.1f} %", None, "attention counts all of the square"),
    ]


def _run(plan: Plan) -> list[Row]:
    run, cluster = plan.run, plan.cluster
    every = f"every {run.every_steps} steps; best every {run.best_every_steps} ({100 * run.best_goodput:.2f} %)"
    rows = [
        Row("steps", f"{run.steps:,}", None, f"{run.tokens:,} tokens"),
        Row("checkpoint", _size(run.checkpoint_bytes), None, every),
        Row("save", duration(run.save_s), None, f"in the background; training stands still for {run.stall_s:.2f} s"),
        Row("restore", duration(run.restore_s)),
        Row(
            "interruptions", f"{run.interruptions:.2f}", None, f"{cluster.interruptions_per_gpu_day:.2e} a GPU and day"
        ),
        Row("goodput", f"{100 * run.goodput:.2f} %", None, "of the wall-clock time"),
        Row("duration", duration(run.wall_s), None, f"{run.gpu_hours:,.0f} GPU hours"),
    ]
    if run.cost is not None:
        rows.append(Row("cost", f"{run.cost:,.0f}", None, f"at {cluster.price_per_gpu_hour} a GPU hour"))
    return rows


def _size(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def duration(seconds: float) -> str:
    """For a person."""
    if math.isinf(seconds):
        return "never"
    for unit, scale in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.1f} s"


def advice(nearest: Sequence[Layout]) -> str:
    """What would fit, in a sentence."""
    if not nearest:
        return "No one or two changes that the planner knows make it fit: take more nodes or a smaller model."
    told = "; ".join(
        f"{one.overrides} ({one.total_bytes / GIB:.1f} GiB, {one.tokens_per_s_gpu:,.0f} tokens/s/GPU)"
        for one in nearest
    )
    return f"What would fit: {told}."
