"""Owns what a rank's memory holds at each stage of a step, by component, and so whether a job fits.

It knows nothing of time. It describes this engine: fp32 parameters and gradients in FSDP2 shards, copies in the compute
type gathered a block ahead, the root gathered for the whole step, a chunked loss that keeps the head's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from cherry.hardware import FRAGMENTATION, WORKSPACE_BYTES, usable_bytes
from cherry.planner.activations import Activations, boundary_bytes, layer_activations, root_bytes
from cherry.planner.matmuls import HELD_BYTES, held_elements
from cherry.planner.muon import state_bytes, workspace_bytes
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
    """One class of ranks."""

    name: str
    stages: dict[str, Components]
    """Bytes by component at each stage of a step."""
    usable: int

    @cached_property
    def peak_stage(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: sum(self.stages[stage].values()))

    @property
    def components(self) -> Components:
        """At the peak."""
        return self.stages[self.peak_stage]

    @property
    def total(self) -> int:
        """At the peak, with what is outside of torch's tensors."""
        return sum(self.components.values())

    @property
    def allocated(self) -> int:
        """Of it, what torch.cuda.max_memory_allocated counts."""
        return max(_tensors(stage) for stage in self.stages.values())

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.total <= self.usable


def _tensors(stage: Components) -> int:
    return sum(size for name, size in stage.items() if name not in ("communication", "fragmentation"))


def memory_of(work: Workload) -> tuple[RankMemory, ...]:
    """The busiest ranks, whose experts are chosen most, and the average ones."""
    busiest = busiest_of(work)
    if work.imbalance <= 1:
        return (busiest,)
    return busiest, replace(busiest_of(replace(work, assumed_imbalance=1.0)), name="average ranks")


def busiest_of(work: Workload) -> RankMemory:
    """The ranks that need most, alone."""
    name = "busiest ranks" if work.imbalance > 1 else "every rank"
    stages = _with_overheads(work, _Stages(work, network_of(work), work.imbalance).all())
    return RankMemory(name, stages, usable_bytes(work.gpu, work.gpus_per_node))


def _with_overheads(work: Workload, stages: dict[str, Components]) -> dict[str, Components]:
    """The same with what the allocator and the communication libraries take."""
    groups = (work.dense_group, work.expert_group, work.expert_shard_group, work.context_group, work.replicate_group)
    # And the default group of all ranks, which norms and counts are summed over.
    # Tokens that go to each node once have one between nodes and one inside.
    communicators = sum(group.ranks > 1 for group in groups) + (work.ranks > 1) + work.once_per_node
    buffers = 0 if work.gpu.shared_memory else communicators * 2 * work.nccl_bytes
    fixed = ("parameters", "optimizer states")
    # What keeps its size from step to step leaves no holes.
    return {
        name: stage
        | {
            "communication": buffers,
            "fragmentation": int(FRAGMENTATION * sum(stage[key] for key in stage if key not in fixed)),
        }
        for name, stage in stages.items()
    }


@dataclass(frozen=True)
class Gathering:
    """The largest of each kind of FSDP2's buffers in a step: what a memory tracker calls them."""

    unsharded: int
    """Parameters in use: the root's and a block's."""
    all_gather: int
    """What arrived and is not yet in use: at the first forward pass the root's, with the first block's behind it."""
    reduce_scatter: int
    """Gradients that are being summed: the root's, laid out anew in the type that travels."""


def gathering_of(work: Workload) -> Gathering:
    """FSDP2's buffers, for a layout that shards."""
    network, size = network_of(work), work.type_bytes
    first = network.dense if network.dense_layers else network.mixture
    largest = max(layer.elements for layer in _kinds(network))
    root = size * network.root.elements
    ahead = first.elements if work.expert > 1 else 0  # without an expert axis, FSDP2 looks ahead by itself
    reduced = max(unit.trained_elements for layer in _kinds(network) for unit in layer.units)
    return Gathering(
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
    """The stages of one rank's step."""

    work: Workload
    network: Network
    imbalance: float

    def all(self) -> dict[str, Components]:
        """By name, in their order."""
        found = {"forward, loss": self._loss(), "backward, head": self._head()}
        found |= {f"backward, {name}": stage for name, stage in self._blocks()}
        if not (self.work.alone or self.work.unsharded):
            found["backward, root"] = self._root()
        found["optimizer"] = self._stage(gradients=self._gradients(1.0), activations=workspace_bytes(self.work))
        return found

    def _stage(self, **parts: int) -> Components:
        """A stage's components: what is always there, and `parts`."""
        stage = dict(self._always)
        for name, size in parts.items():
            stage[name.replace("_", " ")] += size
        return stage

    @cached_property
    def _always(self) -> Components:
        work, network = self.work, self.network
        here = 0 if work.cpu_offload else 1
        copies = work.type_bytes * network.total("elements") + int(HELD_BYTES * held_elements(work))
        always = {
            "parameters": here * _FP32 * network.total("padded"),
            "optimizer states": here * state_bytes(work),
            "gathered layers": copies if work.alone else 0,
        }
        workspace = {"activations": 0 if work.gpu.shared_memory else WORKSPACE_BYTES}
        return dict.fromkeys(COMPONENTS[:-2], 0) | always | workspace

    def _gradients(self, share: float) -> int:
        """Of the trained parameters whose backward pass is done."""
        work = self.work
        if work.cpu_offload:
            return 0
        own = work.type_bytes if work.alone and work.accumulation == 1 else _FP32
        return int(share * own * self.network.total("padded_trained"))

    def _gradients_before(self) -> int:
        """What earlier micro-batches of the same step left."""
        return self._gradients(1.0) if self.work.accumulation > 1 else 0

    def _gathered_root(self) -> int:
        apart = self.work.alone or self.work.unsharded
        return 0 if apart else self.work.type_bytes * self.network.root.elements

    def _gathered(self, layer: Layer) -> int:
        """A block's parameters in use, or on their way."""
        apart = self.work.alone or self.work.unsharded
        return 0 if apart else self.work.type_bytes * layer.elements

    def _kept(self, dense: int, mixture: int) -> int:
        """What stays gathered of so many layers; of experts only where all of it does (cherry/distributed/fsdp.py)."""
        work = self.work
        if work.alone or work.unsharded or not work.kept_share:
            return 0
        whole = work.kept_share >= 1
        layers = ((self.network.dense, dense), (self.network.mixture, mixture))
        elements = sum(
            count * unit.elements for layer, count in layers for unit in layer.units if whole or unit.name != EXPERTS
        )
        return int(work.type_bytes * work.kept_share * elements)

    @cached_property
    def _of_mixture(self) -> Activations:
        return layer_activations(self.work, moe=True, imbalance=self.imbalance)

    @cached_property
    def _of_dense(self) -> Activations:
        return layer_activations(self.work, moe=False, imbalance=1.0)

    def _waiting(self, dense: int, mixture: int) -> int:
        """Activations of so many layers, and of the root."""
        if self.work.recompute == "full":
            layers = (dense + mixture) * boundary_bytes(self.work)
        else:
            layers = dense * self._of_dense.saved + mixture * self._of_mixture.saved
        return layers + root_bytes(self.work)

    @property
    def _losses(self) -> int:
        return 1 + self.work.model.num_nextn_predict_layers

    @property
    def _head_elements(self) -> int:
        return self.work.model.vocab_size * self.work.model.hidden_size

    @property
    def _head_gradient(self) -> int:
        """What a loss keeps from forward to backward: the head's gradient, summed over chunks in fp32."""
        chunked = self.work.loss_chunk_tokens < self.work.tokens
        return (_FP32 if chunked else self.work.type_bytes) * self._head_elements

    def _loss(self) -> Components:
        """The last loss' last chunk: its logits, the gradients of all losses, one chunk's part of the head's."""
        work = self.work
        chunk = min(work.loss_chunk_tokens, work.tokens)
        # The CPU has no kernel that works in place: the logits' fp32 copy besides.
        logits = chunk * work.model.vocab_size * (work.type_bytes + (_FP32 if work.gpu.shared_memory else 0))
        part = work.type_bytes * self._head_elements if chunk < work.tokens else 0
        hidden = (self._losses + 1) * boundary_bytes(work)
        return self._stage(
            gradients=self._gradients_before(),
            gathered_layers=self._gathered_root() + self._kept(self.network.dense_layers, self.network.mixture_layers),
            activations=self._waiting(self.network.dense_layers, self.network.mixture_layers),
            logits=logits + self._losses * self._head_gradient + part + hidden,
        )

    def _head(self) -> Components:
        """The first loss' backward: its kept gradient, scaled, and rounded to the parameter's type."""
        work = self.work
        in_type = work.type_bytes * self._head_elements
        rounded = 0 if self._head_gradient == in_type else in_type
        last = self.network.mixture if self.network.mixture_layers else self.network.dense
        return self._stage(
            gradients=self._gradients_before(),
            gathered_layers=self._gathered_root()
            + max(self._gathered(last), self._kept(self.network.dense_layers, self.network.mixture_layers)),
            activations=self._waiting(self.network.dense_layers, self.network.mixture_layers),
            logits=(self._losses + 1) * self._head_gradient + rounded + self._losses * boundary_bytes(work),
        )

    def _blocks(self) -> Iterator[tuple[str, Components]]:
        """The first and the last block of each kind to go back: between them, all grows and shrinks evenly."""
        dense, mixture = self.network.dense_layers, self.network.mixture_layers
        if mixture:
            yield "last mixture layer", self._block(self._of_mixture, dense, mixture, moe=True)
            yield "first mixture layer", self._block(self._of_mixture, dense, 1, moe=True)
        if dense:
            yield "last dense layer", self._block(self._of_dense, dense, 0, moe=False)
            yield "first dense layer", self._block(self._of_dense, 1, 0, moe=False)

    def _block(self, own: Activations, dense: int, mixture: int, *, moe: bool) -> Components:
        """One block's backward pass, with `dense` and `mixture` layers that wait, itself included."""
        work, network = self.work, self.network
        layer = network.mixture if moe else network.dense
        before = network.dense if network.dense_layers and mixture <= 1 else network.mixture
        layers = (network.dense_layers - dense, network.mixture_layers - mixture)
        trained = layers[0] * network.dense.trained_elements + layers[1] * network.mixture.trained_elements
        share = trained / max(1, network.total("trained_elements"))
        gathered = self._gathered_root() + self._kept(dense, mixture)
        if work.kept_share < 1:
            gathered += self._gathered(layer) + (self._gathered(before) if dense + mixture > 1 else 0)
        live = own.saved if work.recompute == "full" else 0
        return self._stage(
            gradients=max(self._gradients(share), self._gradients_before()) + self._unreduced(layer),
            gathered_layers=gathered,
            reduction_buffers=self._travelling(layer, before),
            activations=self._waiting(dense, mixture) + live + own.transient,
            dispatch=own.dispatch,
        )

    def _unreduced(self, layer: Layer) -> int:
        """Gradients in the compute type: this block's, and the root's, which are summed last."""
        work = self.work
        if work.alone or work.unsharded:
            largest = max(layer.trained_elements, self._head_elements)
            return work.type_bytes * largest if work.alone and work.accumulation > 1 else 0
        # The MTP module, whose backward pass comes first, leaves gradients of all of the root.
        root = self.network.root.trained_elements
        root = root if work.model.num_nextn_predict_layers else min(root, self._head_elements)
        return work.type_bytes * (layer.trained_elements + root)

    def _travelling(self, layer: Layer, before: Layer) -> int:
        """A unit's gradients while they are summed beside the next one's backward pass."""
        if self.work.alone or self.work.unsharded:
            return 0
        return self.work.reduce_bytes * max(unit.trained_elements for unit in (*layer.units, *before.units))

    def _root(self) -> Components:
        """The end of the backward pass: the root's gradients, and the same laid out anew for their sum."""
        trained = self.network.root.trained_elements
        return self._stage(
            gradients=self._gradients(1.0) + self.work.type_bytes * trained,
            reduction_buffers=self.work.reduce_bytes * trained,
        )
