"""Time of an optimizer step: compute, communication, and the communication that compute does not hide.

FSDP2's collectives overlap with compute, separately in the forward and in the backward pass; the experts' all-to-all
overlaps with nothing, as cherry/distributed/expert_parallel.py waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from cherry.planner.compute import (
    Passes,
    Times,
    fsdp_copy_bytes,
    head_passes,
    layer_passes,
    mtp_passes,
    optimizer_seconds,
)
from cherry.planner.links import all_reduce_seconds, all_to_all_seconds, ring_seconds
from cherry.planner.matmuls import MatmulTime, head_matmul, layer_matmuls, memory_seconds, mtp_matmul, time_of
from cherry.planner.optimizer_cost import orthogonalize_seconds, row_exchange_seconds
from cherry.planner.units import EXPERTS, Layer, Network, Unit, network_of
from cherry.planner.workload import Group, Workload

# All-to-alls of a pass: dispatch and combine.
_ALL_TO_ALLS = 2


@dataclass(frozen=True)
class StepTime:
    """Time of one optimizer step, seconds."""

    work: Workload
    busy: dict[str, float]
    """Compute seconds of the device by kind of operation, overlapped or not."""
    collectives: dict[str, float]
    """Communication seconds by kind of collective, overlapped or not."""
    exposed: dict[str, float]
    """Seconds that the step takes beyond its compute, by the collective or host work that is waited for."""
    total: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", sum(self.busy.values()) + sum(self.exposed.values()))

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all ranks."""
        return self.work.batch_sequences * self.work.sequence_length / self.total

    @property
    def tokens_per_s_gpu(self) -> float:
        """Tokens per second of one rank."""
        return self.tokens_per_s / self.work.ranks

    @cached_property
    def matmuls(self) -> tuple[MatmulTime, ...]:
        """Time of each matmul in the step, by name and size; `busy` has their sum."""
        work, network, found = self.work, network_of(self.work), dict[str, MatmulTime]()
        forwards = 2 if work.recompute == "full" else 1
        for moe, count in ((False, network.dense_layers), (True, network.mixture_layers)):
            for matmul in layer_matmuls(work, moe=moe) if count else ():
                taken = time_of(work, matmul, times=count * work.accumulation, forwards=forwards)
                found[matmul.name] = found[matmul.name] + taken if matmul.name in found else taken
        outside = [matmul for matmul in (head_matmul(work), mtp_matmul(work)) if matmul.count]
        return (*found.values(), *(time_of(work, matmul, times=work.accumulation) for matmul in outside))

    @cached_property
    def bubbles(self) -> float:
        """Seconds that average ranks wait for those whose experts get most rows: the cost of EP load imbalance."""
        even = step_time(replace(self.work, assumed_imbalance=1.0)) if self.work.imbalance > 1 else self
        return self.total - even.total

    def mfu(self, *, causal: bool) -> float:
        """MFU: model FLOPs over the peak of the compute precision, MTP included; attention's causal half or in full."""
        work = self.work
        each = work.model.flops_per_token(work.sequence_length, causal=causal, with_mtp=True)
        return self.tokens_per_s_gpu * each / work.gpu.flops[work.precision]


def step_time(work: Workload) -> StepTime:
    """Time of a step of this workload."""
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
        inside, across = self._all_to_all()
        gather_forward, gather_backward, reduce = self._collectives()
        root_gather, root_reduce = self._root()
        # Time in which the device waits because the host queues kernels more slowly than they run.
        layers = self.network.dense_layers + self.network.mixture_layers
        computed = forward.total + backward.total + copies + inside + across
        hosted = max(0.0, layers * work.efficiency.layer_s - computed)
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
        replicas = self._replicas()
        if slowed := self._slowed(count * (gather_forward + gather_backward + reduce), replicas):
            busy["beside NCCL"] = slowed
        # Behind the last micro-batch's backward pass only.
        spare = max(0.0, backward.total - gather_backward - reduce)
        exposed = {
            "gathering": count * (hidden_forward + root_gather),
            "gathering and reducing": count * (hidden_backward + root_reduce),
            "all-to-all in a node": count * inside,
            "all-to-all across nodes": count * across,
            "context": count * self._context(),
            "replicas": max(0.0, replicas - spare),
            "host": count * hosted + work.efficiency.step_s,
        }
        if rows := row_exchange_seconds(work):
            exposed["optimizer's matrices"] = rows
        collectives = {
            "all-gather, forward": count * (gather_forward + root_gather),
            "all-gather, backward": count * gather_backward,
            "reduce-scatter": count * (reduce + root_reduce),
            "all-to-all in a node": exposed["all-to-all in a node"],
            "all-to-all across nodes": exposed["all-to-all across nodes"],
            "context": exposed["context"],
            "all-reduce of replicas": replicas,
            "optimizer's matrices": exposed.get("optimizer's matrices", 0.0),
        }
        return StepTime(work, busy, collectives, exposed)

    def _replicas(self) -> float:
        """Seconds of the sum over replicas."""
        work, values = self.work, self.network.total("padded_trained")
        if work.posts_gradients and work.dense_shards == 1:  # whole gradients, in their own type
            rate = work.gpu.link_rate * work.efficiency.link
            return work.type_bytes * values * (work.replicate - 1) / rate
        return all_reduce_seconds(work, work.replicate_group, work.replicate_bytes * values)

    def _slowed(self, shards: float, replicas: float) -> float:
        """Seconds that matmuls take longer beside NCCL's kernels in a node.

        Args:
            shards: seconds of all-gathers and reduce-scatters.
            replicas: seconds of the sum over replicas.
        """
        work = self.work
        near = 0.0 if work.posts_gradients else replicas * (work.replicate_group.nodes == 1)
        near += 0.0 if work.posts_gradients else shards * (work.dense_group.nodes == 1)
        return work.efficiency.beside_nccl * near

    def _compute(self) -> tuple[Times, Times]:
        forward, backward = Times(), Times()
        for passes in (head_passes(self.work), mtp_passes(self.work)):
            forward, backward = forward + passes.forward, backward + passes.backward
        for _, count, passes in self._layers:
            forward, backward = forward + passes.forward * count, backward + passes.backward * count
        return forward, backward

    def _copies(self) -> float:
        """Seconds of FSDP2's copies in device memory."""
        network = self.network
        moved = sum(fsdp_copy_bytes(self.work, network.total("elements"), network.total("trained_elements")))
        slow = self.work.ranks > 1 and not self.work.keeps_working_copies
        return memory_seconds(self.work, moved) / (self.work.efficiency.fsdp_copies if slow else 1.0)

    def _all_to_all(self) -> tuple[float, float]:
        """Seconds of dispatch and combine, intra-node and across nodes: forward, backward, and recompute's forward."""
        work = self.work
        passes = 3 if work.recompute == "full" else 2
        inside, across = all_to_all_seconds(work, work.type_bytes * work.model.hidden_size)
        if work.gathers_tokens:
            inside = max(0.0, inside - self._shared_experts())
        count = passes * _ALL_TO_ALLS * self.network.mixture_layers
        return count * inside, count * across

    def _shared_experts(self) -> float:
        """Seconds of the shared experts' forward pass, beside which tokens travel."""
        work, model = self.work, self.work.model
        flops = 6.0 * work.tokens * model.hidden_size * model.n_shared_experts * model.moe_intermediate_size
        return flops / (work.gpu.flops[work.precision] * work.efficiency.matmul[work.precision])

    def _collectives(self) -> tuple[float, float, float]:
        """Seconds of the blocks' all-gathers in the forward and in the backward pass, and of their reduce-scatters."""
        forward = reduce = 0.0
        for layer, count, _ in self._layers:
            for unit in layer.units:
                group = self._group(unit)
                forward += count * self._gather(unit, group)
                reduce += count * self._reduce(unit, group)
        return forward, forward if self.work.kept_share < 1 else 0.0, reduce

    def _gather(self, unit: Unit, group: Group) -> float:
        """Seconds of a unit's all-gather in each micro-batch; what stays gathered is gathered once a step."""
        seconds = ring_seconds(self.work, group, self.work.type_bytes * unit.elements)
        if self.work.keeps_working_copies:
            return seconds / self.work.accumulation
        if self.work.cpu_offload:  # the shard comes from the CPU's memory first
            seconds += self.work.type_bytes * unit.padded / self.work.gpu.host_rate
        return seconds

    def _reduce(self, unit: Unit, group: Group) -> float:
        """Seconds of the reduction of a unit's gradients, which leave in their own type where parameters stay."""
        size = self.work.type_bytes if self.work.keeps_working_copies else self.work.reduce_bytes
        return ring_seconds(self.work, group, size * unit.trained_elements)

    def _root(self) -> tuple[float, float]:
        """Seconds of the root's all-gather, before any compute, and of its reduce-scatter, after all of it."""
        unit, group = self.network.root, self.work.dense_group
        return self._gather(unit, group), self._reduce(unit, group)

    def _group(self, unit: Unit) -> Group:
        return self.work.expert_shard_group if unit.name == EXPERTS else self.work.dense_group

    def _context(self) -> float:
        """Seconds of context parallelism: latents all-gathered in the forward pass, reduced in the backward pass."""
        work, model = self.work, self.work.model
        if work.context == 1:
            return 0.0
        size = work.type_bytes * work.tokens * work.context * (model.kv_lora_rank + model.qk_rope_head_dim)
        passes = 3 if work.recompute == "full" else 2
        layers = self.network.dense_layers + self.network.mixture_layers
        return passes * layers * ring_seconds(work, work.context_group, size)
