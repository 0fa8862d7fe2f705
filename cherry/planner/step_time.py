"""Owns how long an optimizer step takes: what computes, what travels, and what of that nothing hides.

It knows nothing of runs or costs. FSDP2's collectives run beside computation, in a forward and a backward pass each for
themselves; the experts' all-to-all stands still with everything else, as cherry/distributed/expert_parallel.py waits
for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from cherry.planner.compute import (
    Passes,
    Times,
    gathering_bytes,
    head_passes,
    layer_passes,
    mtp_passes,
    optimizer_seconds,
)
from cherry.planner.links import all_reduce_seconds, exchange_seconds, ring_seconds
from cherry.planner.matmuls import MatmulTime, head_matmul, layer_matmuls, memory_seconds, mtp_matmul, time_of
from cherry.planner.muon import exchange_seconds as matrix_exchange_seconds
from cherry.planner.muon import orthogonalize_seconds
from cherry.planner.units import EXPERTS, Layer, Network, Unit, network_of
from cherry.planner.workload import Group, Workload

# Exchanges of rows in a pass: there and back.
_EXCHANGES = 2


@dataclass(frozen=True)
class StepTime:
    """One optimizer step, seconds."""

    work: Workload
    busy: dict[str, float]
    """Of the device by kind of work, whatever else runs meanwhile."""
    travelling: dict[str, float]
    """Of the network by kind of collective."""
    exposed: dict[str, float]
    """What the step waits for beside its computation."""
    total: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", sum(self.busy.values()) + sum(self.exposed.values()))

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.work.batch_sequences * self.work.sequence_length / self.total

    @property
    def tokens_per_s_gpu(self) -> float:
        """Of one rank."""
        return self.tokens_per_s / self.work.ranks

    @cached_property
    def matmuls(self) -> tuple[MatmulTime, ...]:
        """What `busy` has of them, by name and size."""
        work, network, found = self.work, network_of(self.work), dict[str, MatmulTime]()
        forwards = 2 if work.recompute == "full" else 1
        for moe, count in ((False, network.dense_layers), (True, network.mixture_layers)):
            for matmul in layer_matmuls(work, moe=moe) if count else ():
                taken = time_of(work, matmul, times=count * work.accumulation, forwards=forwards)
                found[matmul.name] = found[matmul.name] + taken if matmul.name in found else taken
        outside = [one for one in (head_matmul(work), mtp_matmul(work)) if one.count]
        return (*found.values(), *(time_of(work, one, times=work.accumulation) for one in outside))

    @cached_property
    def bubbles(self) -> float:
        """Of the total, what average ranks wait for the busiest ones, whose experts are chosen most."""
        even = step_time(replace(self.work, assumed_imbalance=1.0)) if self.work.imbalance > 1 else self
        return self.total - even.total

    def mfu(self, *, causal: bool) -> float:
        """Model FLOPs over the peak of the compute precision, MTP included; attention by its causal half or in full."""
        work = self.work
        each = work.model.flops_per_token(work.sequence_length, causal=causal, with_mtp=True)
        return self.tokens_per_s_gpu * each / work.gpu.flops[work.precision]


def step_time(work: Workload) -> StepTime:
    """A step of this workload."""
    return _Step(work, network_of(work)).time()


@dataclass(frozen=True)
class _Step:
    work: Workload
    network: Network

    @cached_property
    def _layers(self) -> list[tuple[Layer, int, Passes]]:
        found = []
        if self.network.dense_layers:
            passes = layer_passes(self.work, moe=False)
            found.append((self.network.dense, self.network.dense_layers, passes))
        if self.network.mixture_layers:
            found.append((self.network.mixture, self.network.mixture_layers, layer_passes(self.work, moe=True)))
        return found

    def time(self) -> StepTime:
        work, count = self.work, self.work.accumulation
        forward, backward = self._compute()
        copies = self._copies()
        inside, across = self._exchange()
        gather_forward, gather_backward, reduce = self._collectives()
        root_gather, root_reduce = self._root()
        # A queue that the host fills more slowly than the device empties it.
        layers = self.network.dense_layers + self.network.mixture_layers
        computed = forward.total + backward.total + copies + inside + across
        hosted = max(0.0, layers * work.reach.layer_s - computed)
        hidden_forward = max(0.0, gather_forward - forward.total - copies / 2)
        hidden_backward = max(0.0, gather_backward + reduce - backward.total - copies / 2)
        both = forward + backward
        busy = {
            "matmuls": count * both.matmuls,
            "experts' matmuls": count * both.experts,
            "attention": count * both.attention,
            "between matmuls": count * (both.memory + copies),
            "optimizer": optimizer_seconds(work) + orthogonalize_seconds(work),
        }
        shard_bytes = work.replicate_bytes * self.network.total("padded_trained")
        replicas = all_reduce_seconds(work, work.replicate_group, shard_bytes)
        # Behind the last micro-batch's backward pass only.
        spare = max(0.0, backward.total - gather_backward - reduce)
        exposed = {
            "gathering": count * (hidden_forward + root_gather),
            "gathering and reducing": count * (hidden_backward + root_reduce),
            "all-to-all in a node": count * inside,
            "all-to-all across nodes": count * across,
            "context": count * self._context(),
            "replicas": max(0.0, replicas - spare),
            "host": count * hosted + work.reach.step_s,
        }
        if rows := matrix_exchange_seconds(work):
            exposed["optimizer's matrices"] = rows
        travelling = {
            "all-gather, forward": count * (gather_forward + root_gather),
            "all-gather, backward": count * gather_backward,
            "reduce-scatter": count * (reduce + root_reduce),
            "all-to-all in a node": exposed["all-to-all in a node"],
            "all-to-all across nodes": exposed["all-to-all across nodes"],
            "context": exposed["context"],
            "all-reduce of replicas": replicas,
            "optimizer's matrices": exposed.get("optimizer's matrices", 0.0),
        }
        return StepTime(work, busy, travelling, exposed)

    def _compute(self) -> tuple[Times, Times]:
        forward, backward = Times(), Times()
        for passes in (head_passes(self.work), mtp_passes(self.work)):
            forward, backward = forward + passes.forward, backward + passes.backward
        for _, count, passes in self._layers:
            forward, backward = forward + passes.forward * count, backward + passes.backward * count
        return forward, backward

    def _copies(self) -> float:
        """FSDP2's own traffic in memory."""
        network = self.network
        moved = sum(gathering_bytes(self.work, network.total("elements"), network.total("trained_elements")))
        return memory_seconds(self.work, moved)

    def _exchange(self) -> tuple[float, float]:
        """Rows to experts and back, in and across nodes: forward, backward, and again where forward runs twice."""
        work = self.work
        passes = 3 if work.recompute == "full" else 2
        inside, across = exchange_seconds(work, work.type_bytes * work.model.hidden_size)
        count = passes * _EXCHANGES * self.network.mixture_layers
        return count * inside, count * across

    def _collectives(self) -> tuple[float, float, float]:
        """Gathering of blocks in the forward and in the backward pass, and the sum of their gradients."""
        forward = reduce = 0.0
        for layer, count, _ in self._layers:
            for unit in layer.units:
                group = self._group(unit)
                forward += count * self._gather(unit, group)
                reduce += count * ring_seconds(self.work, group, self.work.reduce_bytes * unit.trained_elements)
        return forward, forward if self.work.kept_share < 1 else 0.0, reduce

    def _gather(self, unit: Unit, group: Group) -> float:
        seconds = ring_seconds(self.work, group, self.work.type_bytes * unit.elements)
        if self.work.cpu_offload:  # the shard comes from the CPU's memory first
            seconds += self.work.type_bytes * unit.padded / self.work.gpu.host_rate
        return seconds

    def _root(self) -> tuple[float, float]:
        """The root's gathering, before anything computes, and its sum, after everything has."""
        unit, group = self.network.root, self.work.dense_group
        reduce = ring_seconds(self.work, group, self.work.reduce_bytes * unit.trained_elements)
        return self._gather(unit, group), reduce

    def _group(self, unit: Unit) -> Group:
        return self.work.expert_shard_group if unit.name == EXPERTS else self.work.dense_group

    def _context(self) -> float:
        """Latents of the whole sequence, gathered in the forward pass and summed in the backward pass."""
        work, model = self.work, self.work.model
        if work.context == 1:
            return 0.0
        size = work.type_bytes * work.tokens * work.context * (model.kv_lora_rank + model.qk_rope_head_dim)
        passes = 3 if work.recompute == "full" else 2
        layers = self.network.dense_layers + self.network.mixture_layers
        return passes * layers * ring_seconds(work, work.context_group, size)
