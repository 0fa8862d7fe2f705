"""FSDP units: the parameters that FSDP2 all-gathers and reduce-scatters together, and the size of a rank's shards.

The units are those of cherry/distributed/fsdp.py: each block, with expert parallelism a block's experts by themselves,
and the root with embedding, head and the MTP module's own parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from cherry.parallel_rules import shards_by_width
from cherry.planner.workload import Workload
from cherry.train_config import LoraConfig
from model.model_config import ModelConfig

Shape = tuple[int, ...]
EXPERTS = "experts"
"""Name of the unit that holds an EP rank's experts of a layer."""


@dataclass(frozen=True)
class MatrixShape:
    """A parameter of a decoder block that Muon updates (cherry/optim/build.py, `hidden_matrices`)."""

    shape: Shape
    row_blocks: int = 1
    """Matrices of equal size that are fused along the rows."""

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of each matrix."""
        return self.shape[-2] // self.row_blocks, self.shape[-1]

    @property
    def stacked(self) -> int:
        """Experts, or 1."""
        return math.prod(self.shape[:-2])

    @property
    def count(self) -> int:
        """Matrices in the parameter."""
        return self.stacked * self.row_blocks


@dataclass(frozen=True)
class Unit:
    """Parameters that one `fully_shard` call holds."""

    name: str
    shapes: tuple[Shape, ...]
    """Shapes before FSDP2 shards them; experts' first dimension is the number of an EP rank's experts."""
    shards: int
    """Ranks that they are sharded over."""
    trained: tuple[Shape, ...]
    """Shapes of those that have gradients: all, or with LoRA the adapters."""
    matrices: tuple[MatrixShape, ...] = ()
    """Matrices that Muon updates, where it is the optimizer."""

    @cached_property
    def elements(self) -> int:
        """Elements of the unit, unsharded."""
        return sum(map(math.prod, self.shapes))

    @cached_property
    def trained_elements(self) -> int:
        """Elements with gradients of the unit, unsharded."""
        return sum(map(math.prod, self.trained))

    @cached_property
    def padded(self) -> int:
        """Elements of a rank's shard as FSDP2 allocates it: rows are padded to those of the fullest rank."""
        return sum(self.shard(shape) for shape in self.shapes)

    @cached_property
    def padded_trained(self) -> int:
        """Elements with gradients of a rank's padded shard."""
        return sum(self.shard(shape) for shape in self.trained)

    @cached_property
    def matrix_elements(self) -> int:
        """Elements of the unsharded matrices that Muon updates."""
        return sum(math.prod(matrix.shape) for matrix in self.matrices)

    @cached_property
    def padded_matrices(self) -> int:
        """Elements of a rank's padded shard of the matrices that Muon updates."""
        return sum(self.shard(matrix.shape) for matrix in self.matrices)

    def shards_rows(self, shape: Shape) -> bool:
        """Whether the rows of a parameter's matrices are sharded over ranks."""
        return self.shards > 1 and (len(shape) == 2 or self._by_width(shape))

    def shard(self, shape: Shape) -> int:
        """Elements of the fullest rank's shard of one parameter."""
        if self._by_width(shape):
            return math.prod(shape) // self.shards
        return math.ceil(shape[0] / self.shards) * math.prod(shape[1:])

    def _by_width(self, shape: Shape) -> bool:
        if len(shape) != 3:
            return False
        return shards_by_width(shape[0], shape[1], self.shards, expert_parallel=self.name == EXPERTS)


@dataclass(frozen=True)
class Layer:
    """FSDP units of one decoder layer: the block, and with expert parallelism its experts."""

    moe: bool
    units: tuple[Unit, ...]

    @property
    def elements(self) -> int:
        """Elements of the layer, unsharded."""
        return sum(unit.elements for unit in self.units)

    @property
    def trained_elements(self) -> int:
        """Elements with gradients of the layer, unsharded."""
        return sum(unit.trained_elements for unit in self.units)


@dataclass(frozen=True)
class Network:
    """FSDP units of a model, as one rank holds them."""

    dense: Layer
    mixture: Layer
    dense_layers: int
    mixture_layers: int
    """Number of MoE layers, the MTP module's block included."""
    root: Unit

    @cached_property
    def _totals(self) -> dict[str, int]:
        units = [(unit, self.dense_layers) for unit in self.dense.units]
        units += [(unit, self.mixture_layers) for unit in self.mixture.units]
        units += [(self.root, 1)]
        names = ("elements", "trained_elements", "padded", "padded_trained", "matrix_elements", "padded_matrices")
        return {name: sum(count * getattr(unit, name) for unit, count in units) for name in names}

    def total(self, of: str) -> int:
        """Sum of a property of units (`elements`, `padded`, `matrix_elements`, ...) over all units of the network."""
        return self._totals[of]


def network_of(work: Workload) -> Network:
    """FSDP units of a workload's model on its layout."""
    return _network(work.model, work.dense_shards, work.expert_shards, work.expert, work.lora)


def whole_network(model: ModelConfig, lora: LoraConfig | None) -> Network:
    """FSDP units of a model on one rank: their totals are those of all ranks of any layout, without padding."""
    return _network(model, 1, 1, 1, lora)


@lru_cache(maxsize=512)
def _network(
    model: ModelConfig, dense_shards: int, expert_shards: int, expert: int, lora: LoraConfig | None
) -> Network:
    mtp = model.num_nextn_predict_layers
    return Network(
        dense=_layer(model, dense_shards, expert_shards, expert, lora, moe=False),
        mixture=_layer(model, dense_shards, expert_shards, expert, lora, moe=True),
        dense_layers=model.first_k_dense_replace,
        mixture_layers=model.n_moe_layers + mtp,
        root=_unit("root", _root(model), dense_shards, [], lora),
    )


def _layer(
    model: ModelConfig, dense_shards: int, expert_shards: int, expert: int, lora: LoraConfig | None, *, moe: bool
) -> Layer:
    width = model.hidden_size
    linears = model.attention_linears()
    shapes: list[Shape] = [(width,), (width,), *((size,) for size in model.attention_norms()), *linears.values()]
    matrices = [MatrixShape(shape) for shape in linears.values()]
    if not moe:
        feed_forward: list[Shape] = [(2 * model.intermediate_size, width), (width, model.intermediate_size)]
        shapes += feed_forward
        matrices += _fused_pair(feed_forward)
        return Layer(moe, (_unit("dense block", shapes, dense_shards, list(linears.items()), lora, matrices),))
    shared = model.shared_expert_linears()
    shapes += [(model.n_routed_experts, width), *shared.values()]
    matrices += _fused_pair(list(shared.values()))
    own = model.n_routed_experts // expert
    experts: list[Shape] = [(own, 2 * model.moe_intermediate_size, width), (own, width, model.moe_intermediate_size)]
    adapted = [*linears.items(), *shared.items()]
    if expert == 1:
        matrices += _fused_pair(experts)
        return Layer(moe, (_unit("mixture block", shapes + experts, dense_shards, adapted, lora, matrices),))
    dense = _unit("mixture block", shapes, dense_shards, adapted, lora, matrices)
    return Layer(moe, (dense, _unit(EXPERTS, experts, expert_shards, [], lora, _fused_pair(experts))))


def _fused_pair(shapes: Sequence[Shape]) -> list[MatrixShape]:
    """A feed-forward's two parameters, of which the first has gate and up projections fused; or none."""
    return [MatrixShape(shape, row_blocks) for shape, row_blocks in zip(shapes, (2, 1), strict=False)]


def _unit(
    name: str,
    shapes: list[Shape],
    shards: int,
    adapted: Sequence[tuple[str, Shape]],
    lora: LoraConfig | None,
    matrices: Sequence[MatrixShape] = (),
) -> Unit:
    if lora is None:
        return Unit(name, tuple(shapes), shards, tuple(shapes), tuple(matrices))
    chosen = [shape for key, shape in adapted if lora.targets is None or key in lora.targets]
    adapters = [part for out, into in chosen for part in ((lora.rank, into), (out, lora.rank))]
    return Unit(name, (*shapes, *adapters), shards, tuple(adapters))


def _root(model: ModelConfig) -> list[Shape]:
    width, vocabulary = model.hidden_size, model.vocab_size
    shapes: list[Shape] = [(vocabulary, width), (width,), (vocabulary, width)]
    if model.num_nextn_predict_layers:
        shapes += [(width,), (width,), (width, 2 * width), (width,)]
    return shapes
