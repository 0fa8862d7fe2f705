"""What Muon takes of a rank: its momenta, its workspace, its matrix products and the exchange of matrices' rows.

It follows cherry/optim/muon.py: matrices that are whole on a rank are orthogonalized there, those whose rows are
sharded by owners, each of which gets its share; replicas repeat each other's work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from cherry.hardware import COLLECTIVE_S
from cherry.optim.muon_buckets import BUCKET_BYTES, BUCKET_ELEMENTS
from cherry.planner.links import all_to_all_seconds
from cherry.planner.matmuls import Matmul, compute_precision, forward_seconds, memory_seconds
from cherry.planner.units import EXPERTS, MatrixShape, Unit, network_of
from cherry.planner.workload import Group, Workload

# Memory traffic of an element beside matrix products, eager, by counting passes of `_step` and `orthogonalize`: the
# fp32 gradient (8), clip (8), momentum (20) and Nesterov (12), to bf16 and in one batch (10), norm and division (6),
# back to fp32 and scaled (14), decay and update of the parameter (20).
_ELEMENT_BYTES = 98
_EXCHANGE_BYTES = 2 * 8
"""Rows in bf16 laid out for their way, put together, and the same back."""
_WIDENED_BYTES = 12
"""A bf16 momentum, to fp32 and back."""
_ROWS_BYTES = 2
"""Of an element on its way."""


def state_bytes(work: Workload) -> int:
    """A rank's optimizer states: two moments of each trained element, one momentum of each of Muon's."""
    network = network_of(work)
    matrices = network.total("padded_matrices") if work.optimizer == "muon" else 0
    return work.moment_bytes * (2 * network.total("padded_trained") - matrices)


def checkpoint_state_bytes(work: Workload) -> int:
    """Optimizer states in a checkpoint: of all ranks, replicas once, without padding."""
    network = network_of(work)
    matrices = network.whole("matrix_elements", work.expert) if work.optimizer == "muon" else 0
    return work.moment_bytes * (2 * network.whole("trained_elements", work.expert) - matrices)


def workspace_bytes(work: Workload) -> int:
    """What a bucket takes at its peak, in the compute type."""
    if work.optimizer != "muon":
        return 0
    sizes = [math.prod(matrix.sides) for unit, _ in _units(work) for matrix in unit.matrices]
    own = network_of(work).total("padded_matrices")
    per_element = BUCKET_BYTES * (2 if work.gpu.shared_memory else 1)  # fp32 on a CPU
    return per_element * max(min(BUCKET_ELEMENTS, own), max(sizes, default=0))


def orthogonalize_seconds(work: Workload) -> float:
    """Muon's update of a rank's share of the matrices: Newton-Schulz, and the passes over memory around it."""
    if work.optimizer != "muon":
        return 0.0
    products, shared, largest = 0.0, 0.0, 0.0
    for unit, layers in _units(work):
        for matrix in unit.matrices:
            one = _matrix_seconds(work, matrix)
            count = layers * matrix.count
            if unit.cuts_rows(matrix.shape):
                shared += count * one / unit.shards
                largest = max(largest, one)
            else:
                products += layers * matrix.row_blocks * math.ceil(matrix.stacked / unit.shards) * one
    network = network_of(work)
    each = _ELEMENT_BYTES + (_WIDENED_BYTES if work.moment_bytes == 2 else 0)
    moved = each * network.total("padded_matrices") + _EXCHANGE_BYTES * sum(size for _, size in _exchanged(work))
    return products + max(shared, largest) + memory_seconds(work, moved)


def exchange_seconds(work: Workload) -> float:
    """All-to-all of sharded matrices' rows, to their owners and back."""
    if work.optimizer != "muon":
        return 0.0
    return sum(
        2 * all_to_all_seconds(work, group, _ROWS_BYTES * elements) + 2 * COLLECTIVE_S * (elements // BUCKET_ELEMENTS)
        for group, elements in _exchanged(work)
    )


def _exchanged(work: Workload) -> Iterator[tuple[Group, int]]:
    """Elements of a rank's shards of the matrices whose rows a group shares."""
    for unit, layers in _units(work):
        elements = layers * sum(unit.shard(one.shape) for one in unit.matrices if unit.cuts_rows(one.shape))
        if elements:
            yield work.expert_shard_group if unit.name == EXPERTS else work.dense_group, elements


def _units(work: Workload) -> Iterator[tuple[Unit, int]]:
    network = network_of(work)
    for layer, count in ((network.dense, network.dense_layers), (network.mixture, network.mixture_layers)):
        yield from ((unit, count) for unit in layer.units if count)


def _matrix_seconds(work: Workload, matrix: MatrixShape) -> float:
    """Newton-Schulz of one matrix: 4 k^2 l + 2 k^3 FLOPs an iteration, k <= l its sides."""
    short, long = sorted(matrix.sides)
    precision, times = compute_precision(work) if not work.gpu.shared_memory else "fp32", work.newton_schulz_steps
    gram = Matmul("gram", short, long, short, precision, times)
    square = Matmul("polynomial", short, short, short, precision, times)
    product = Matmul("update", short, short, long, precision, times)
    return sum(forward_seconds(work, one) for one in (gram, square, product))
