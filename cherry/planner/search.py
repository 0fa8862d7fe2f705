"""Search over parallel layouts: all that fit on the plan's ranks, fastest first, and the nearest that would fit.

The batch of an optimizer step stays the same, so the training result does not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from cherry.cluster import ClusterSpec
from cherry.hardware import GPUS, Gpu
from cherry.parallel_rules import experts_shard_evenly, sequence_divides
from cherry.planner.memory import busiest_of
from cherry.planner.plan import Plan, layout_of
from cherry.planner.step_time import step_time
from cherry.planner.workload import Workload
from cherry.train_config import TrainConfig

# What the configuration takes; a precision that only hardware has is no layout.
_PRECISIONS: tuple[str, ...] = get_args(TrainConfig.model_fields["precision"].annotation)
_CONTEXT = (1, 2, 4, 8)
# Sequences of a micro-batch: no rank holds as many, and a batch may be of any size.
_MICRO_SEQUENCES = 4096
_CHUNKS = (512, 1024, 2048, 4096)
_MORE_NODES = (2, 4, 8)
# Bytes of a gradient that replicas reduce as it is.
_FP32 = 4.0


@dataclass(frozen=True)
class Layout:
    """One layout, its peak memory and its speed."""

    changes: dict[str, object]
    """Keys of the configuration that differ from the plan's, with their values."""
    work: Workload
    total_bytes: int
    fits: bool
    tokens_per_s_gpu: float

    @property
    def overrides(self) -> str:
        """The changes as `key=value` words of the `cherry` command."""
        words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in self.changes.items()}
        return " ".join(f"{key}={value}" for key, value in words.items())


def search(plan: Plan) -> list[Layout]:
    """All layouts on the plan's ranks that fit, fastest first; of equals, the one with the most room."""
    own = plan.work
    found: list[Layout] = []
    for replicate in _powers(own.ranks):
        fitting = _fitting((_search_keys(own, work), work) for work in _layouts(own, replicate))
        if not fitting and replicate > 1:
            break  # more replicas share a parameter among fewer ranks
        found += fitting
    return sorted(found, key=lambda layout: (-layout.tokens_per_s_gpu, layout.total_bytes))


def _search_keys(own: Workload, work: Workload) -> dict[str, object]:
    before, after = layout_of(own), layout_of(work)
    # `shard` follows from the others.
    return {key: value for key, value in after.items() if value != before[key] and key != "parallel.shard"}


def _layouts(own: Workload, replicate: int) -> Iterator[Workload]:
    precisions = offered_precisions(own.gpu, _PRECISIONS)
    for expert in _powers(min(own.ranks, own.model.n_routed_experts)):
        for context in _CONTEXT:
            base = _relayout(own, replicate=replicate, expert=expert, context=context)
            for micro in _micro_batches(base) if base is not None else ():
                for precision in precisions:
                    for recompute in ("none", "full"):
                        work = replace(micro, precision=precision, recompute=recompute)
                        yield from (replace(work, kept_share=share) for share in _kept_shares(own, work))


def _kept_shares(own: Workload, work: Workload) -> list[float]:
    """The plan's own share of parameters that stay gathered; all where that makes a step faster; none beside all."""
    stays = work.ranks > 1 and work.replicate_bytes == _FP32 and replace(work, kept_share=1.0).keeps_working_copies
    return sorted({own.kept_share, *([1.0] if stays else []), *([0.0] if own.kept_share == 1 else [])})


def offered_precisions(gpu: Gpu, known: Sequence[str]) -> list[str]:
    """Precisions that both the configuration and the device have."""
    return [name for name in known if name in gpu.precisions]


def _powers(limit: int) -> Iterator[int]:
    value = 1
    while value <= limit:
        yield value
        value *= 2


def _relayout(own: Workload, **axes: int) -> Workload | None:
    """The workload on the same ranks and batch with other axes; `None` where the configuration would refuse them."""
    replicate = axes.get("replicate", own.replicate)
    expert, context = axes.get("expert", own.expert), axes.get("context", own.context)
    inner = replicate * expert * context
    if own.ranks % inner or own.model.n_routed_experts % expert or not sequence_divides(own.sequence_length, context):
        return None
    shard = own.ranks // inner
    experts, shards = own.model.n_routed_experts // expert, shard * context
    widths = (own.model.hidden_size, 2 * own.model.moe_intermediate_size)
    if expert > 1 and not experts_shard_evenly(experts, widths, shards):
        return None
    data_ranks = own.ranks // context
    if own.batch_sequences % data_ranks:
        return None
    each = own.batch_sequences // data_ranks
    accumulation = own.accumulation if each % own.accumulation == 0 else each
    return replace(
        own,
        replicate=replicate,
        shard=shard,
        context=context,
        expert=expert,
        accumulation=accumulation,
        micro_sequences=each // accumulation,
    )


def _micro_batches(work: Workload) -> Iterator[Workload]:
    """The workload with its batch in every number of micro-batches that it divides into, its own among them."""
    each = work.micro_sequences * work.accumulation
    for sequences in sorted({*range(1, min(each, _MICRO_SEQUENCES) + 1), work.micro_sequences}):
        if each % sequences == 0:
            yield replace(work, micro_sequences=sequences, accumulation=each // sequences)


def _evaluate(work: Workload, changes: dict[str, object]) -> Layout:
    ranks = busiest_of(work)
    speed = step_time(work).tokens_per_s_gpu if ranks.fits else 0.0
    return Layout(changes, work, ranks.total, ranks.fits, speed)


def nearest_that_fit(plan: Plan, limit: int = 5) -> list[Layout]:
    """Layouts one change, or else two, away from a plan that does not fit, after which it does; fastest first."""
    found = _fitting(_changes(plan.work, plan.cluster)) or _fitting(_pairs(plan))
    return sorted(found, key=lambda layout: -layout.tokens_per_s_gpu)[:limit]


def _fitting(candidates: Iterable[tuple[dict[str, object], Workload]]) -> list[Layout]:
    return [layout for changes, work in candidates if (layout := _evaluate(work, changes)).fits]


def _pairs(plan: Plan) -> Iterator[tuple[dict[str, object], Workload]]:
    """Pairs of changes of different keys, each pair once, with the workload after both."""
    seen: set[frozenset[tuple[str, object]]] = set()
    for first, work in _changes(plan.work, plan.cluster):
        for second, both in _changes(work, plan.cluster):
            changes = {**first, **second}
            known = frozenset(changes.items())
            if not first.keys() & second.keys() and known not in seen:
                seen.add(known)
                yield changes, both


def _changes(own: Workload, cluster: ClusterSpec) -> Iterator[tuple[dict[str, object], Workload]]:
    """Single changes that could make room, each with the workload after it."""
    if own.recompute == "none":
        yield {"train.activation_checkpointing": "full"}, replace(own, recompute="full")
    if own.kept_share == 1 and own.ranks > 1:
        yield {"parallel.reshard_after_forward": True}, replace(own, kept_share=0.0)
    if own.moment_bytes == 4:
        yield {"train.optimizer_state_dtype": "bf16"}, replace(own, moment_bytes=2)
    if own.precision == "fp32" and "bf16" in own.gpu.precisions:
        yield {"train.precision": "bf16"}, replace(own, precision="bf16")
    if own.reduce_bytes == 4 and own.ranks > 1:
        yield {"communication.reduce_dtype": "bf16"}, replace(own, reduce_bytes=2)
    if not own.cpu_offload and not own.gpu.shared_memory and own.optimizer == "adamw":
        yield {"parallel.cpu_offload": True}, replace(own, cpu_offload=True)
    for micro in _micro_batches(own):
        if micro.micro_sequences < own.micro_sequences:
            yield {"train.gradient_accumulation_steps": micro.accumulation}, micro
    for axis, sizes in (("expert", _powers(own.model.n_routed_experts)), ("context", _CONTEXT), ("replicate", (1,))):
        for size in sizes:
            other = _relayout(own, **{axis: size}) if size != getattr(own, axis) else None
            if other is not None and other.accumulation == own.accumulation:
                yield {f"parallel.{axis}": size}, other
    # A chunk as large as the micro-batch needs no fp32 sum of the head's gradient, smaller ones have fewer logits.
    for chunk in sorted({*_CHUNKS, own.tokens} - {own.loss_chunk_tokens}):
        if chunk <= own.tokens:
            yield {"train.loss_chunk_tokens": chunk}, replace(own, loss_chunk_tokens=chunk)
    yield from _other_machines(own, cluster)


def _other_machines(own: Workload, cluster: ClusterSpec) -> Iterator[tuple[dict[str, object], Workload]]:
    if cluster.kind != "nodes":
        return
    nodes = own.ranks // own.gpus_per_node
    for times in _MORE_NODES:
        if own.batch_sequences * own.context % (own.ranks * times) == 0 and own.micro_sequences % times == 0:
            micro, accumulation = own.micro_sequences // times, own.accumulation
        elif own.accumulation % times == 0:
            micro, accumulation = own.micro_sequences, own.accumulation // times
        else:
            continue
        changes: dict[str, object] = {"launch.nnodes": nodes * times}
        if accumulation != own.accumulation:
            changes["train.gradient_accumulation_steps"] = accumulation
        yield changes, replace(own, shard=own.shard * times, micro_sequences=micro, accumulation=accumulation)
    for gpu in GPUS.values():
        if own.precision in gpu.precisions and gpu.memory_bytes > own.gpu.memory_bytes and not gpu.shared_memory:
            yield {"the cluster's gpu": gpu.name}, replace(own, gpu=gpu)
