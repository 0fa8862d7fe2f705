"""Owns how a plan is told in rows: by a terminal, Prefect's page or MLflow alike.

It knows nothing of any of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cherry.hardware import GIB
from cherry.planner.plan import Plan
from cherry.planner.search import Layout

_SHOWN_SECONDS = 5e-4
"""Shorter parts of a step are left out."""
_SHOWN_SHARE = 0.01
"""Of the step: smaller matmuls are told together."""
# What each collective runs beside, and what of a step's waiting is its own.
_BESIDE = {
    "all-gather, forward": ("the forward pass", "gathering"),
    "all-gather, backward": ("the backward pass", "gathering and reducing"),
    "reduce-scatter": ("the backward pass", "gathering and reducing"),
    "all-reduce of replicas": ("the last backward pass", "replicas"),
}


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


def memory_title(plan: Plan) -> str:
    """Of a picture of its memory."""
    return f"{plan.job} on {plan.work.ranks} x {plan.work.gpu.name}: memory of {plan.worst.name}"


def unused(plan: Plan) -> str:
    """What of the cluster the job leaves idle; empty when it takes all."""
    cluster, work = plan.cluster, plan.work
    if cluster.kind != "nodes" or work.ranks >= cluster.gpus:
        return ""
    nodes, on_node = work.ranks // work.gpus_per_node, work.gpus_per_node
    keys = {"launch.nnodes": (nodes, cluster.nodes), "launch.nproc_per_node": (on_node, cluster.gpus_per_node)}
    overrides = " ".join(f"{key}={there}" for key, (asked, there) in keys.items() if asked != there)
    return f"takes {work.ranks} of the cluster's {cluster.gpus} GPUs; all with {overrides}"


def sections_of(plan: Plan) -> list[tuple[str, list[Row]]]:
    """Titles and their rows."""
    worst = plan.worst
    return [
        (
            f"memory of {worst.name}, GiB, in {worst.peak_stage}; {worst.usable / GIB:.1f} usable",
            _memory(plan),
        ),
        ("a step, seconds", _step(plan)),
        ("matmuls of a step, seconds; rows x inputs x outputs, precision, TFLOP/s", _matmuls(plan)),
        ("communication of a step, seconds; what it hides behind", _communication(plan)),
        ("speed", _speed(plan)),
        ("the run", _run(plan)),
    ]


def _memory(plan: Plan) -> list[Row]:
    """The ranks that need most; what the others have less, beside it."""
    worst, others = plan.worst, [ranks for ranks in plan.memory if ranks is not plan.worst]

    def row(name: str, size: int, other: dict[str, int]) -> Row:
        differing = [f"{size / GIB:.2f} {ranks}" for ranks, size in other.items()]
        return Row(name, f"{size / GIB:.2f}", min(1.0, size / worst.usable), ", ".join(differing))

    rows = [
        row(name, size, {ranks.name: ranks.components[name] for ranks in others if ranks.components[name] != size})
        for name, size in worst.components.items()
        if size >= 2**20
    ]
    return [*rows, row("all", worst.total, {ranks.name: ranks.total for ranks in others})]


def _step(plan: Plan) -> list[Row]:
    step = plan.step
    rows = [Row(name, f"{s:.3f}", s / step.total) for name, s in step.busy.items() if s >= _SHOWN_SECONDS]
    rows += [
        Row(f"waiting: {name}", f"{s:.3f}", s / step.total) for name, s in step.exposed.items() if s >= _SHOWN_SECONDS
    ]
    hidden = sum(step.travelling.values()) - sum(s for name, s in step.exposed.items() if name != "host")
    rows.append(Row("all", f"{step.total:.3f}", None, f"{max(0.0, hidden):.3f} of communication hidden"))
    if step.bubbles >= _SHOWN_SECONDS:
        rows.append(Row("of it, bubbles", f"{step.bubbles:.3f}", None, "waiting for the busiest ranks"))
    return rows


def _matmuls(plan: Plan) -> list[Row]:
    """Largest first: rows, inputs and outputs, precision and rate."""
    step = plan.step
    shown = [one for one in step.matmuls if one.seconds >= _SHOWN_SHARE * step.total]
    rows = []
    for one in sorted(shown, key=lambda one: -one.seconds):
        matmul = one.matmul
        sizes = f"{matmul.rows:,.0f} x {matmul.into:,} x {matmul.out:,}"
        note = f"{sizes}, {matmul.precision}, {one.flops / one.seconds / 1e12:,.3g}"
        rows.append(Row(matmul.name, f"{one.seconds:.3f}", None, note))
    rest = sum(one.seconds for one in step.matmuls) - sum(one.seconds for one in shown)
    return [*rows, Row("others", f"{rest:.3f}")] if rest >= _SHOWN_SECONDS else rows


def _communication(plan: Plan) -> list[Row]:
    """How long each collective travels, and what hides it; both that run in the backward pass share its waiting."""
    step = plan.step
    rows = []
    for name, seconds in step.travelling.items():
        beside, waiting = _BESIDE.get(name, ("nothing", ""))
        left = step.exposed.get(waiting, 0.0)
        note = f"{beside}, but for {left:.3f}" if left >= _SHOWN_SECONDS else beside
        if seconds >= _SHOWN_SECONDS:
            rows.append(Row(name, f"{seconds:.3f}", None, note))
    return rows or [Row("none", "0.000")]


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
    background = "in the background, but for the stall" if run.save_s else ""
    every = f"every {run.every_steps} steps; best every {run.best_every_steps} ({100 * run.best_goodput:.2f} %)"
    rows = [
        Row("steps", f"{run.steps:,}", None, f"{run.tokens:,} tokens"),
        Row("checkpoint", _size(run.checkpoint_bytes), None, every),
        Row("save", duration(run.stall_s + run.save_s), None, background),
        Row("checkpoint stall", f"{run.stall_s:.2f} s", None, f"{run.stall_s / run.every_steps:.2g} s a step"),
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
