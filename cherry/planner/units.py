"""Owns which parameters FSDP2 gathers and reduces together, and how large a rank's shards of them are.

It knows nothing of time. The units are those of cherry/distributed/fsdp.py: each block by itself, a block's experts by
themselves where an expert axis deals them out, and the root with embedding, head and the MTP module's own parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from cherry.job_config import LoraConfig
from cherry.planner.workload import Workload
from model.model_config import ModelConfig

Shape = tuple[int, ...]
EXPERTS = "experts"
"""The unit of experts that an expert axis deals out."""


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
    """As FSDP2 cuts them; experts' first dimension is what the expert axis leaves to a rank."""
    shards: int
    trained: tuple[Shape, ...]
    """Those of them that have gradients: all, or adapters alone."""
    matrices: tuple[MatrixShape, ...] = ()
    """Those of them that Muon updates where the optimizer is Muon."""

    @cached_property
    def elements(self) -> int:
        """Gathered whole."""
        return sum(map(math.prod, self.shapes))

    @cached_property
    def trained_elements(self) -> int:
        """Gathered whole, of those that have gradients."""
        return sum(map(math.prod, self.trained))

    @cached_property
    def padded(self) -> int:
        """Elements of a rank's shard as FSDP2 allocates it on every rank: rows are padded to the fullest rank's."""
        return sum(self.shard(shape) for shape in self.shapes)

    @cached_property
    def padded_trained(self) -> int:
        """The same of those that have gradients."""
        return sum(self.shard(shape) for shape in self.trained)

    @cached_property
    def matrix_elements(self) -> int:
        """Elements of the matrices that Muon updates, gathered whole."""
        return sum(math.prod(matrix.shape) for matrix in self.matrices)

    @cached_property
    def padded_matrices(self) -> int:
        """Elements of a rank's shard of the matrices that Muon updates."""
        return sum(self.shard(matrix.shape) for matrix in self.matrices)

    def cuts_rows(self, shape: Shape) -> bool:
        """Whether ranks share the rows of a parameter's matrices."""
        return self.shards > 1 and (len(shape) == 2 or self._by_width(shape))

    def shard(self, shape: Shape) -> int:
        """Elements of the fullest rank's part: by rows; experts that do not go round are cut by width (fsdp.py)."""
        if self._by_width(shape):
            return math.prod(shape) // self.shards
        return math.ceil(shape[0] / self.shards) * math.prod(shape[1:])

    def _by_width(self, shape: Shape) -> bool:
        if len(shape) != 3 or shape[1] % self.shards:
            return False
        return shape[0] % self.shards != 0 if self.name == EXPERTS else shape[0] < self.shards


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its dense unit, and its experts where they are a unit of their own."""

    moe: bool
    units: tuple[Unit, ...]

    @property
    def elements(self) -> int:
        """Gathered whole."""
        return sum(unit.elements for unit in self.units)

    @property
    def trained_elements(self) -> int:
        """Gathered whole, of those that have gradients."""
        return sum(unit.trained_elements for unit in self.units)


@dataclass(frozen=True)
class Network:
    """A model as a rank holds it."""

    dense: Layer
    mixture: Layer
    dense_layers: int
    mixture_layers: int
    """The MTP module's block included."""
    root: Unit

    @cached_property
    def _totals(self) -> dict[str, int]:
        units = [(unit, self.dense_layers) for unit in self.dense.units]
        units += [(unit, self.mixture_layers) for unit in self.mixture.units]
        units += [(self.root, 1)]
        names = ("elements", "trained_elements", "padded", "padded_trained", "matrix_elements", "padded_matrices")
        return {name: sum(count * getattr(unit, name) for unit, count in units) for name in names}

    def total(self, of: str) -> int:
        """The sum of a property of units (`elements`, `padded`, `padded_trained`, ...) over the whole network."""
        return self._totals[of]

    def whole(self, of: str, expert: int) -> int:
        """The same over all ranks of an expert axis of that size: what a checkpoint holds."""
        dealt = sum(self.mixture_layers * getattr(unit, of) for unit in self.mixture.units if unit.name == EXPERTS)
        return self.total(of) + int((expert - 1) * dealt)


def network_of(work: Workload) -> Network:
    """The units of a workload's model."""
    return _network(work.model, work.dense_shards, work.expert_shards, work.expert, work.lora)


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
    linears = attention_linears(model)
    shapes: list[Shape] = [(width,), (width,), *_attention_norms(model), *linears.values()]
    matrices = [MatrixShape(shape) for shape in linears.values()]
    if not moe:
        feed_forward: list[Shape] = [(2 * model.intermediate_size, width), (width, model.intermediate_size)]
        shapes += feed_forward
        matrices += _fused_pair(feed_forward)
        return Layer(moe, (_unit("dense block", shapes, dense_shards, list(linears.items()), lora, matrices),))
    shared = shared_linears(model)
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


def attention_linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Attention's projections by name, (outputs, inputs)."""
    width, heads = model.hidden_size, model.num_attention_heads
    query = heads * model.qk_head_dim
    found: dict[str, tuple[int, int]] = {}
    if model.q_lora_rank is None:
        found["q_proj"] = (query, width)
    else:
        found |= {"q_a_proj": (model.q_lora_rank, width), "q_b_proj": (query, model.q_lora_rank)}
    found["kv_a_proj_with_mqa"] = (model.kv_lora_rank + model.qk_rope_head_dim, width)
    found["kv_b_proj"] = (heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank)
    return found | {"o_proj": (width, heads * model.v_head_dim)}


def shared_linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The shared experts' projections by name, (outputs, inputs)."""
    width, shared = model.hidden_size, model.n_shared_experts * model.moe_intermediate_size
    return {"shared_gate_up": (2 * shared, width), "shared_down": (width, shared)} if shared else {}


def _attention_norms(model: ModelConfig) -> list[Shape]:
    widths = (model.kv_lora_rank, model.q_lora_rank)
    return [(width,) for width in widths if width is not None]


def _root(model: ModelConfig) -> list[Shape]:
    width, vocabulary = model.hidden_size, model.vocab_size
    shapes: list[Shape] = [(vocabulary, width), (width,), (vocabulary, width)]
    if model.num_nextn_predict_layers:
        shapes += [(width,), (width,), (width, 2 * width), (width,)]
    return shapes
