"""Optimizer states, and the cost of Muon on a rank: workspace, matrix products, and the all-to-all of matrices' rows.

The plan follows cherry/optim/muon.py: unsharded matrices are orthogonalized on their rank, those whose rows are sharded
by owner ranks, each of which gets its share; replicas repeat each other's work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from cherry.hardware import COLLECTIVE_S
from cherry.optim.muon_buckets import BUCKET_BYTES, BUCKET_ELEMENTS
from cherry.planner.links import even_all_to_all_seconds
from cherry.planner.matmuls import Matmul, compute_precision, forward_seconds, memory_seconds
from cherry.planner.units import EXPERTS, MatrixShape, Network, Unit, network_of
from cherry.planner.workload import Group, Workload, moment_bytes
from cherry.train_config import TrainConfig

# Memory traffic of an element beside matrix products, eager, by counting passes of `_step` and `orthogonalize`: the
# fp32 gradient (8), clip (8), momentum (20) and Nesterov (12), to bf16 and in one batch (10), norm and division (6),
# back to fp32 and scaled (14), decay and update of the parameter (20).
_ELEMENT_BYTES = 98
_EXCHANGE_BYTES = 2 * 8
"""Bytes per element to pack bf16 rows for the all-to-all and unpack them, both ways."""
_WIDENED_BYTES = 12
"""Bytes per element to cast a bf16 momentum to fp32 and back."""
_ROWS_BYTES = 2
"""Bytes per element sent."""


def state_bytes(work: Workload) -> int:
    """Bytes of a rank's optimizer states: two moments an element with AdamW, one momentum with Muon."""
    network = network_of(work)
    matrices = network.total("padded_matrices") if work.optimizer == "muon" else 0
    return work.moment_bytes * (2 * network.total("padded_trained") - matrices)


def checkpoint_state_bytes(network: Network, train: TrainConfig) -> int:
    """Bytes of the optimizer states in a checkpoint: of all ranks, replicas once, without padding.

    Args:
        network: not sharded (`whole_network`).
    """
    matrices = network.total("matrix_elements") if train.optimizer == "muon" else 0
    return moment_bytes(train) * (2 * network.total("trained_elements") - matrices)


def workspace_bytes(work: Workload) -> int:
    """Peak bytes of a bucket of matrices, in the compute type."""
    if work.optimizer != "muon":
        return 0
    sizes = [math.prod(matrix.sides) for unit, _ in _units(work) for matrix in unit.matrices]
    own = network_of(work).total("padded_matrices")
    per_element = BUCKET_BYTES * (2 if work.gpu.shared_memory else 1)  # fp32 on a CPU
    return per_element * max(min(BUCKET_ELEMENTS, own), max(sizes, default=0))


def orthogonalize_seconds(work: Workload) -> float:
    """Seconds of Muon's update of a rank's share of the matrices: Newton-Schulz, and the memory passes around it."""
    if work.optimizer != "muon":
        return 0.0
    products, shared, largest = 0.0, 0.0, 0.0
    for unit, layers in _units(work):
        for matrix in unit.matrices:
            per_matrix = _matrix_seconds(work, matrix)
            count = layers * matrix.count
            if unit.shards_rows(matrix.shape):
                shared += count * per_matrix / unit.shards
                largest = max(largest, per_matrix)
            else:
                products += layers * matrix.row_blocks * math.ceil(matrix.stacked / unit.shards) * per_matrix
    network = network_of(work)
    each = _ELEMENT_BYTES + (_WIDENED_BYTES if work.moment_bytes == 2 else 0)
    moved = each * network.total("padded_matrices") + _EXCHANGE_BYTES * sum(size for _, size in _exchanged(work))
    return products + max(shared, largest) + memory_seconds(work, moved)


def row_exchange_seconds(work: Workload) -> float:
    """Seconds of the all-to-all of sharded matrices' rows, to their owner ranks and back."""
    if work.optimizer != "muon":
        return 0.0
    return sum(
        2 * even_all_to_all_seconds(work, group, _ROWS_BYTES * elements)
        + 2 * COLLECTIVE_S * (elements // BUCKET_ELEMENTS)
        for group, elements in _exchanged(work)
    )


def _exchanged(work: Workload) -> Iterator[tuple[Group, int]]:
    """Each group with the elements of a rank's shards of the matrices whose rows it shares."""
    for unit, layers in _units(work):
        elements = layers * sum(unit.shard(matrix.shape) for matrix in unit.matrices if unit.shards_rows(matrix.shape))
        if elements:
            yield work.expert_shard_group if unit.name == EXPERTS else work.dense_group, elements


def _units(work: Workload) -> Iterator[tuple[Unit, int]]:
    network = network_of(work)
    for layer, count in ((network.dense, network.dense_layers), (network.mixture, network.mixture_layers)):
        yield from ((unit, count) for unit in layer.units if count)


def _matrix_seconds(work: Workload, matrix: MatrixShape) -> float:
    """Seconds of Newton-Schulz of one matrix: 4 k^2 l + 2 k^3 FLOPs an iteration, k <= l its sides."""
    short, long = sorted(matrix.sides)
    precision, times = compute_precision(work) if not work.gpu.shared_memory else "fp32", work.newton_schulz_steps
    gram = Matmul("gram", short, long, short, precision, times)
    square = Matmul("polynomial", short, short, short, precision, times)
    product = Matmul("update", short, short, long, precision, times)
    return sum(forward_seconds(work, matmul) for matmul in (gram, square, product))
