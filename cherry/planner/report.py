"""Report of a plan as titled rows, for a terminal, Prefect and MLflow alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cherry.cluster import ClusterSpec
from cherry.hardware import GIB
from cherry.planner.plan import Plan
from cherry.planner.search import Layout

_SHOWN_SECONDS = 5e-4
"""Seconds below which a part of a step is left out."""
_SHOWN_SHARE = 0.01
"""Fraction of a step below which matmuls are summed up in one row."""
# The pass that each collective overlaps with, and the key of its exposed time in `StepTime.exposed`.
_OVERLAPS = {
    "all-gather, forward": ("the forward pass", "gathering"),
    "all-gather, backward": ("the backward pass", "gathering and reducing"),
    "reduce-scatter": ("the backward pass", "gathering and reducing"),
    "all-reduce of replicas": ("the last backward pass", "replicas"),
}


# Labels for a person, where the keys of plan.json are not the field's terms.
_MEMORY = {"gathered layers": "unsharded parameters"}
_COMPUTE = {"matmuls": "dense matmuls", "experts' matmuls": "expert matmuls", "between matmuls": "memory-bound ops"}
_EXPOSED = {
    "gathering": "forward all-gather",
    "gathering and reducing": "backward all-gather, reduce-scatter",
    "context": "context parallel",
    "replicas": "all-reduce of replicas",
}


@dataclass(frozen=True)
class Row:
    """One figure of the report."""

    name: str
    value: str
    share: float | None = None
    """Fraction of its section's total, for a bar."""
    note: str = ""


def headline(plan: Plan) -> str:
    """One line with devices, layout, micro-batches, precision and recompute."""
    work = plan.work
    axes = {"replicate": work.replicate, "shard": work.shard, "context": work.context, "expert": work.expert}
    layout = ", ".join(f"{axis} {size}" for axis, size in axes.items())
    micro = f"{work.accumulation} x {work.micro_sequences} sequences of {work.sequence_length:,} a rank"
    recompute = "full recompute" if work.recompute == "full" else "no recompute"
    return f"{work.ranks} x {work.gpu.name}: {layout}; {micro}; {work.precision}, {recompute}"


def summary_line(plan: Plan) -> str:
    """The plan in a short line: devices, speed, and the peak memory that the run's measured one is compared with."""
    of = "a rank's process" if plan.work.gpu.shared_memory else "a GPU"
    peak = f"{plan.peak_memory_bytes / GIB:.2f} GiB at the peak of {of}"
    return f"{plan.work.ranks} x {plan.work.gpu.name}, {plan.step.tokens_per_s:,.0f} tokens/s, {peak}"


def memory_title(plan: Plan) -> str:
    """Title of a plot of the plan's memory."""
    return f"{plan.job} on {plan.work.ranks} x {plan.work.gpu.name}: memory of {plan.worst.name}"


def unused(plan: Plan) -> str:
    """Sentence about the GPUs of the cluster that the job leaves idle; empty when it takes all."""
    cluster, work = plan.cluster, plan.work
    if cluster.kind != "nodes" or work.ranks >= cluster.gpus:
        return ""
    nodes, on_node = work.ranks // work.gpus_per_node, work.gpus_per_node
    keys = {"launch.nnodes": (nodes, cluster.node_count), "launch.nproc_per_node": (on_node, cluster.node_gpus)}
    overrides = " ".join(f"{key}={available}" for key, (asked, available) in keys.items() if asked != available)
    return f"takes {work.ranks} of the cluster's {cluster.gpus} GPUs; all with {overrides}"


def sections_of(plan: Plan) -> list[tuple[str, list[Row]]]:
    """Sections of the report: title and rows."""
    worst = plan.worst
    stage = worst.peak_stage.replace("mixture", "MoE")
    return [
        (
            f"memory of {worst.name}, GiB, in {stage}; {worst.usable / GIB:.1f} usable",
            _memory(plan),
        ),
        ("a step, seconds", _step(plan)),
        ("matmuls of a step, seconds; rows x inputs x outputs, precision, TFLOP/s", _matmuls(plan)),
        ("communication of a step, seconds; what it overlaps with", _communication(plan)),
        ("speed", _speed(plan)),
        ("the run", _run(plan)),
    ]


def _memory(plan: Plan) -> list[Row]:
    """Rows of the ranks that need most, with the other class's figure beside where it differs."""
    worst, others = plan.worst, [ranks for ranks in plan.memory if ranks is not plan.worst]

    def row(name: str, size: int, other: dict[str, int]) -> Row:
        differing = [f"{size / GIB:.2f} {ranks}" for ranks, size in other.items()]
        return Row(_MEMORY.get(name, name), f"{size / GIB:.2f}", min(1.0, size / worst.usable), ", ".join(differing))

    rows = [
        row(name, size, {ranks.name: ranks.components[name] for ranks in others if ranks.components[name] != size})
        for name, size in worst.components.items()
        if size >= 2**20
    ]
    total = row("all", worst.total, {ranks.name: ranks.total for ranks in others})
    kind = "tensors and the process itself" if plan.work.gpu.shared_memory else "tensors, by torch's count"
    return [*rows, total, Row("peak as measured", f"{plan.peak_memory_bytes / GIB:.2f}", None, kind)]


def _step(plan: Plan) -> list[Row]:
    step = plan.step
    rows = [
        Row(_COMPUTE.get(name, name), f"{s:.3f}", s / step.total)
        for name, s in step.busy.items()
        if s >= _SHOWN_SECONDS
    ]
    rows += [
        Row(f"exposed: {_EXPOSED.get(name, name)}", f"{s:.3f}", s / step.total)
        for name, s in step.exposed.items()
        if s >= _SHOWN_SECONDS
    ]
    hidden = sum(step.collectives.values()) - sum(s for name, s in step.exposed.items() if name != "host")
    rows.append(Row("all", f"{step.total:.3f}", None, f"{max(0.0, hidden):.3f} of communication overlapped"))
    if step.bubbles >= _SHOWN_SECONDS:
        rows.append(Row("EP load imbalance", f"{step.bubbles:.3f}", None, "of it, waiting for the busiest ranks"))
    return rows


def _matmuls(plan: Plan) -> list[Row]:
    """Rows of the matmuls, largest first, with their sizes, precision and TFLOP/s."""
    step = plan.step
    shown = [timed for timed in step.matmuls if timed.seconds >= _SHOWN_SHARE * step.total]
    rows = []
    for timed in sorted(shown, key=lambda timed: -timed.seconds):
        matmul = timed.matmul
        sizes = f"{matmul.rows:,.0f} x {matmul.into:,} x {matmul.out:,}"
        note = f"{sizes}, {matmul.precision}, {timed.flops / timed.seconds / 1e12:,.3g}"
        rows.append(Row(matmul.name, f"{timed.seconds:.3f}", None, note))
    rest = sum(timed.seconds for timed in step.matmuls) - sum(timed.seconds for timed in shown)
    return [*rows, Row("others", f"{rest:.3f}")] if rest >= _SHOWN_SECONDS else rows


def _communication(plan: Plan) -> list[Row]:
    """Rows of the collectives: the pass each overlaps with, and exposed time, which both of the backward pass share."""
    step = plan.step
    rows = []
    for name, seconds in step.collectives.items():
        overlap, exposed = _OVERLAPS.get(name, ("nothing", ""))
        left = step.exposed.get(exposed, 0.0)
        note = f"{overlap}, {left:.3f} exposed" if left >= _SHOWN_SECONDS else overlap
        if seconds >= _SHOWN_SECONDS:
            rows.append(Row(_EXPOSED.get(name, name), f"{seconds:.3f}", None, note))
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
    background = "asynchronous, but for the stall" if run.save_s else ""
    every = f"every {run.every_steps} steps; best every {run.best_every_steps} ({100 * run.best_goodput:.2f} %)"
    rows = [
        Row("steps", f"{run.steps:,}", None, f"{run.tokens:,} tokens"),
        Row("checkpoint", _size(run.checkpoint_bytes), None, every),
        Row("save", duration(run.stall_s + run.save_s), None, background),
        Row("checkpoint stall", f"{run.stall_s:.2f} s", None, f"{run.stall_s / run.every_steps:.2g} s a step"),
        Row("restore", duration(run.restore_s)),
        Row(
            "interruptions",
            f"{run.interruptions:.2f}",
            None,
            f"{cluster.interruptions_per_gpu_day:.2e} a GPU and day",
        ),
        Row("goodput", f"{100 * run.goodput:.2f} %", None, "of wall-clock time"),
        Row("duration", duration(run.wall_s), None, f"{run.gpu_hours:,.0f} GPU hours"),
    ]
    if run.cost is not None:
        rows.append(
            Row("cost", cost(run.cost, cluster), None, f"at {cluster.price_per_gpu_hour} {cluster.currency} a GPU hour")
        )
    return rows


def cost(amount: float, cluster: ClusterSpec) -> str:
    """A cost with its currency."""
    return f"{amount:,.0f} {cluster.currency}" if amount >= 10 else f"{amount:,.2f} {cluster.currency}"


def _size(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def duration(seconds: float) -> str:
    """A duration as text, in the largest unit of which there are 1.5."""
    if math.isinf(seconds):
        return "never"
    for unit, scale in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.1f} s"


def advice(nearest: Sequence[Layout]) -> str:
    """Lines with the nearest layouts that fit."""
    if not nearest:
        return "  No one or two changes that the planner knows make it fit: take more nodes or a smaller model."
    layouts = (
        f"  - {layout.overrides}\n    {layout.total_bytes / GIB:,.1f} GiB, {layout.tokens_per_s_gpu:,.0f} tokens/s/GPU"
        for layout in nearest
    )
    return "\n".join(["What would fit:", *layouts])
