"""Memory of a rank at each stage of a step, by component, and whether it fits.

The model is that of this trainer: fp32 parameters and gradients in FSDP2 shards, blocks all-gathered in the compute
type one ahead, the root unsharded for the whole step, a chunked loss that keeps the head's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from cherry.hardware import FRAGMENTATION, WORKSPACE_BYTES, usable_bytes
from cherry.parallel_rules import INBOX_VALUES
from cherry.planner.activations import Activations, boundary_bytes, layer_activations, root_bytes
from cherry.planner.matmuls import CACHED_FP8_BYTES, cached_fp8_elements
from cherry.planner.optimizer_cost import state_bytes, workspace_bytes
from cherry.planner.units import EXPERTS, Layer, Network, network_of
from cherry.planner.workload import Workload

COMPONENTS = (
    "parameters",
    "gradients",
    "optimizer states",
    "gathered layers",
    "reduction buffers",
    "activations",
    "logits",
    "dispatch",
    "communication",
    "fragmentation",
)
Components = dict[str, int]
_FP32 = 4


@dataclass(frozen=True)
class RankMemory:
    """Memory of one class of ranks: all of them, or with EP the busiest and the average ones."""

    name: str
    stages: dict[str, Components]
    """Bytes by component at each stage of a step."""
    usable: int

    @cached_property
    def peak_stage(self) -> str:
        """Name of the stage that needs most."""
        return max(self.stages, key=lambda stage: sum(self.stages[stage].values()))

    @property
    def components(self) -> Components:
        """Bytes by component at the peak stage."""
        return self.stages[self.peak_stage]

    @property
    def total(self) -> int:
        """Peak bytes, communication buffers and fragmentation included."""
        return sum(self.components.values())

    @property
    def allocated(self) -> int:
        """Peak allocated bytes: what torch.cuda.max_memory_allocated reports."""
        return max(_tensors(stage) for stage in self.stages.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is at most the usable memory."""
        return self.total <= self.usable


def _tensors(stage: Components) -> int:
    return sum(size for name, size in stage.items() if name not in ("communication", "fragmentation"))


def memory_of(work: Workload) -> tuple[RankMemory, ...]:
    """Memory of the ranks whose experts get most rows and, where EP makes a difference, of the average ones."""
    busiest = busiest_of(work)
    if work.imbalance <= 1:
        return (busiest,)
    return busiest, replace(busiest_of(replace(work, assumed_imbalance=1.0)), name="average ranks")


def busiest_of(work: Workload) -> RankMemory:
    """Memory of the class of ranks that needs most."""
    name = "busiest ranks" if work.imbalance > 1 else "every rank"
    stages = _with_overheads(work, _Stages(work, network_of(work), work.imbalance).all())
    return RankMemory(name, stages, usable_bytes(work.gpu, work.gpus_per_node))


def _with_overheads(work: Workload, stages: dict[str, Components]) -> dict[str, Components]:
    """Stages with communication buffers and the allocator's fragmentation added."""
    groups = (work.dense_group, work.expert_group, work.expert_shard_group, work.context_group, work.replicate_group)
    # One more is the default group of all ranks, over which norms and counts are summed; a dispatch that sends a token
    # to each node once has a group between nodes and another inside.
    communicators = sum(group.ranks > 1 for group in groups) + (work.ranks > 1) + work.once_per_node
    buffers = 0 if work.gpu.shared_memory else communicators * 2 * work.nccl_bytes
    fixed = ("parameters", "optimizer states")
    # What keeps its size from step to step does not fragment.
    return {
        name: stage
        | {
            "communication": buffers,
            "fragmentation": int(FRAGMENTATION * sum(stage[key] for key in stage if key not in fixed)),
        }
        for name, stage in stages.items()
    }


@dataclass(frozen=True)
class FsdpBuffers:
    """Largest size in a step of each kind of FSDP2's buffers, bytes; named as torch's FSDPMemTracker does."""

    unsharded: int
    """Unsharded parameters: the root's and a block's."""
    all_gather: int
    """All-gather outputs not yet in use: at the first forward pass the root's, with the first block's prefetched."""
    reduce_scatter: int
    """Reduce-scatter inputs: the root's gradients, copied in the reduce type."""


def fsdp_buffers(work: Workload) -> FsdpBuffers:
    """Sizes of FSDP2's buffers, for a layout that shards."""
    network, size = network_of(work), work.type_bytes
    first = network.dense if network.dense_layers else network.mixture
    largest = max(layer.elements for layer in _kinds(network))
    root = size * network.root.elements
    ahead = first.elements if work.expert > 1 else 0  # without EP, FSDP2 prefetches by itself
    reduced = max(unit.trained_elements for layer in _kinds(network) for unit in layer.units)
    return FsdpBuffers(
        unsharded=root + size * largest,
        # A block's buffer is kept until the next one's has arrived.
        all_gather=max(root + size * ahead, 2 * size * largest),
        reduce_scatter=work.reduce_bytes * max(network.root.trained_elements, reduced),
    )


def _kinds(network: Network) -> Iterator[Layer]:
    if network.dense_layers:
        yield network.dense
    if network.mixture_layers:
        yield network.mixture


@dataclass(frozen=True)
class _Stages:
    """Stages of one rank's step, without communication buffers and fragmentation."""

    work: Workload
    network: Network
    imbalance: float

    def all(self) -> dict[str, Components]:
        """Bytes by component of each stage, in the order of a step."""
        found = {"forward, loss": self._loss(), "backward, head": self._head()}
        found |= {f"backward, {name}": stage for name, stage in self._blocks()}
        if self._gathers:
            found["backward, root"] = self._root()
        found["optimizer"] = self._stage(gradients=self._gradients(1.0), activations=workspace_bytes(self.work))
        return found

    def _stage(self, **sizes: int) -> Components:
        """Components of a stage: those of every stage, and `sizes`."""
        stage = dict(self._always)
        for name, size in sizes.items():
            stage[name.replace("_", " ")] += size
        return stage

    @cached_property
    def _always(self) -> Components:
        work, network = self.work, self.network
        on_device = 0 if work.cpu_offload else 1
        copies = work.type_bytes * network.total("elements") + int(CACHED_FP8_BYTES * cached_fp8_elements(work))
        always = {
            "parameters": on_device * _FP32 * network.total("padded"),
            "optimizer states": on_device * state_bytes(work),
            "gathered layers": copies if work.keeps_working_copies else 0,
        }
        workspace = {"activations": 0 if work.gpu.shared_memory else WORKSPACE_BYTES}
        return dict.fromkeys(COMPONENTS[:-2], 0) | always | workspace

    def _gradients(self, share: float) -> int:
        """Bytes of gradients of a share of the trained parameters: those whose backward pass is done."""
        work = self.work
        if work.cpu_offload:
            return 0
        own = work.type_bytes if work.keeps_gradients else _FP32
        return int(share * own * self.network.total("padded_trained"))

    def _gradients_before(self) -> int:
        """Bytes of gradients that earlier micro-batches of the same step left."""
        return self._gradients(1.0) if self.work.accumulation > 1 else 0

    @property
    def _gathers(self) -> bool:
        """Whether FSDP2 all-gathers anything: not on one CPU rank, nor where working copies stay."""
        return not (self.work.keeps_working_copies or self.work.unsharded)

    def _unsharded_root(self) -> int:
        """Bytes of the root's unsharded parameters."""
        return 0 if not self._gathers else self.work.type_bytes * self.network.root.elements

    def _unsharded_block(self, layer: Layer) -> int:
        """Bytes of a block's unsharded parameters, in use or prefetched."""
        return 0 if not self._gathers else self.work.type_bytes * layer.elements

    def _kept(self, dense: int, mixture: int) -> int:
        """Bytes that `dense` + `mixture` layers keep unsharded after forward; experts only in blocks kept in full."""
        work = self.work
        if not (self._gathers and work.kept_share):
            return 0
        full = work.kept_share >= 1
        layers = ((self.network.dense, dense), (self.network.mixture, mixture))
        elements = sum(
            count * unit.elements for layer, count in layers for unit in layer.units if full or unit.name != EXPERTS
        )
        return int(work.type_bytes * work.kept_share * elements)

    @cached_property
    def _moe_activations(self) -> Activations:
        return layer_activations(self.work, moe=True, imbalance=self.imbalance)

    @cached_property
    def _dense_activations(self) -> Activations:
        return layer_activations(self.work, moe=False, imbalance=1.0)

    def _saved(self, dense: int, mixture: int) -> int:
        """Bytes of activations that `dense` and `mixture` layers and the root save for their backward passes."""
        if self.work.recompute == "full":
            layers = (dense + mixture) * boundary_bytes(self.work)
        else:
            layers = dense * self._dense_activations.saved + mixture * self._moe_activations.saved
        return layers + root_bytes(self.work)

    @property
    def _losses(self) -> int:
        return 1 + self.work.model.num_nextn_predict_layers

    @property
    def _head_elements(self) -> int:
        return self.work.model.vocab_size * self.work.model.hidden_size

    @property
    def _head_gradient(self) -> int:
        """Bytes that a loss keeps from forward to backward: the head's gradient, summed over chunks in fp32."""
        chunked = self.work.loss_chunk_tokens < self.work.tokens
        return (_FP32 if chunked else self.work.type_bytes) * self._head_elements

    def _loss(self) -> Components:
        """Components at the last loss' last chunk: its logits, all losses' gradients, a chunk's part of the head's."""
        work = self.work
        chunk = min(work.loss_chunk_tokens, work.tokens)
        # The CPU has no kernel that works in place: the logits' fp32 copy besides.
        logits = chunk * work.model.vocab_size * (work.type_bytes + (_FP32 if work.gpu.shared_memory else 0))
        part = work.type_bytes * self._head_elements if chunk < work.tokens else 0
        hidden = (self._losses + 1) * boundary_bytes(work)
        return self._stage(
            gradients=self._gradients_before(),
            gathered_layers=self._unsharded_root() + self._kept(self.network.dense_layers, self.network.mixture_layers),
            activations=self._saved(self.network.dense_layers, self.network.mixture_layers),
            logits=logits + self._losses * self._head_gradient + part + hidden,
        )

    def _head(self) -> Components:
        """Components at the first loss' backward: its kept gradient, scaled, and rounded to the parameter's type."""
        work = self.work
        in_type = work.type_bytes * self._head_elements
        rounded = 0 if self._head_gradient == in_type else in_type
        last = self.network.mixture if self.network.mixture_layers else self.network.dense
        return self._stage(
            gradients=self._gradients_before(),
            gathered_layers=self._unsharded_root()
            + max(self._unsharded_block(last), self._kept(self.network.dense_layers, self.network.mixture_layers)),
            activations=self._saved(self.network.dense_layers, self.network.mixture_layers),
            logits=(self._losses + 1) * self._head_gradient + rounded + self._losses * boundary_bytes(work),
        )

    def _blocks(self) -> Iterator[tuple[str, Components]]:
        """Name and components of the first and the last backward pass of each kind of block.

        Between these two, all components grow or shrink evenly.
        """
        dense, mixture = self.network.dense_layers, self.network.mixture_layers
        if mixture:
            yield "last mixture layer", self._block(self._moe_activations, dense, mixture, moe=True)
            yield "first mixture layer", self._block(self._moe_activations, dense, 1, moe=True)
        if dense:
            yield "last dense layer", self._block(self._dense_activations, dense, 0, moe=False)
            yield "first dense layer", self._block(self._dense_activations, 1, 0, moe=False)

    def _block(self, own: Activations, dense: int, mixture: int, *, moe: bool) -> Components:
        """Components at a block's backward pass, with `dense` and `mixture` layers still to go, itself included."""
        work, network = self.work, self.network
        layer = network.mixture if moe else network.dense
        before = network.dense if network.dense_layers and mixture <= 1 else network.mixture
        layers = (network.dense_layers - dense, network.mixture_layers - mixture)
        trained = layers[0] * network.dense.trained_elements + layers[1] * network.mixture.trained_elements
        share = trained / max(1, network.total("trained_elements"))
        gathered = self._unsharded_root() + self._kept(dense, mixture)
        if work.kept_share < 1:
            gathered += self._unsharded_block(layer) + (self._unsharded_block(before) if dense + mixture > 1 else 0)
        live = own.saved if work.recompute == "full" else 0
        return self._stage(
            gradients=max(self._gradients(share), self._gradients_before()) + self._unreduced(layer),
            gathered_layers=gathered,
            reduction_buffers=self._reduce_scatter(layer, before),
            activations=self._saved(dense, mixture) + live + own.transient,
            dispatch=own.dispatch,
        )

    def _unreduced(self, layer: Layer) -> int:
        """Bytes of gradients in the compute type: this block's, and the root's, which are reduced last."""
        work = self.work
        if not self._gathers and (work.ranks == 1 or work.unsharded):
            largest = max(layer.trained_elements, self._head_elements)
            return work.type_bytes * largest if work.keeps_working_copies and work.accumulation > 1 else 0
        # The MTP module, whose backward pass comes first, leaves gradients of all of the root.
        root = self.network.root.trained_elements
        root = root if work.model.num_nextn_predict_layers else min(root, self._head_elements)
        return work.type_bytes * (layer.trained_elements + root)

    def _reduce_scatter(self, layer: Layer, before: Layer) -> int:
        """Bytes of a unit's gradients in reduction, beside the next unit's backward pass."""
        work = self.work
        if work.keeps_working_copies and work.ranks > 1:  # the other ranks' parts of a unit
            largest = max(unit.trained_elements for unit in (*layer.units, *before.units))
            values = largest * (work.ranks - 1) // work.ranks
            return work.type_bytes * (min(values, INBOX_VALUES) if work.posts_gradients else values)
        if not self._gathers:
            return 0
        return self.work.reduce_bytes * max(unit.trained_elements for unit in (*layer.units, *before.units))

    def _root(self) -> Components:
        """Components at the end of the backward pass: the root's gradients and their copy in reduction."""
        trained = self.network.root.trained_elements
        return self._stage(
            gradients=self._gradients(1.0) + self.work.type_bytes * trained,
            reduction_buffers=self.work.reduce_bytes * trained,
        )
