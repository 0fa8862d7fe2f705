"""Muon (Keller Jordan, 2024): momentum of hidden matrices, orthogonalized, as Moonlight scales it (arXiv 2502.16982).

A matrix is what the released checkpoint stores as one tensor: each expert of stacked experts [E, M, N], each half of
fused gate and up projections. An unsharded matrix is orthogonalized on its rank. Matrices whose rows are sharded are
distributed over the ranks that share them (row_exchange.py); replicas repeat each other's work. A parameter's momentum
is sharded like the parameter.

Shapes: E experts, M rows, N columns of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cherry.optim.adamw import AdamW, local, local_gradients
from cherry.optim.muon_buckets import BUCKET_ELEMENTS, fill_buckets
from cherry.optim.newton_schulz import orthogonalize
from cherry.optim.protocol import Gradients
from cherry.optim.row_exchange import RowExchange, ShardedRows, assign_owners
from cherry.train_config import MuonConfig


class Muon(AdamW):
    """Muon on the groups that have `row_blocks`, AdamW on all others.

    Args:
        matrices: groups of parameters [M, N] or [E, M, N], each with `row_blocks`: how many matrices of equal size are
            fused along M.
        others: AdamW's groups.
        config: Muon's options.
        lr: learning rate of both: Muon's updates are scaled to AdamW's usual root mean square.
        state_dtype: type of momentum and moments, torch.float32 or torch.bfloat16.
    """

    cast_states = (*AdamW.cast_states, "momentum_buffer")

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        others: Iterable[dict[str, Any]],
        config: MuonConfig,
        *,
        lr: float,
        betas: tuple[float, float],
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        options = {
            "momentum": config.momentum,
            "nesterov": config.nesterov,
            "newton_schulz_steps": config.newton_schulz_steps,
            "update_rms": config.update_rms,
        }
        super().__init__([*({**options, **g} for g in matrices), *others], lr=lr, betas=betas, state_dtype=state_dtype)
        self._plans: dict[tuple[int, ...], _Plan] = {}
        """Update plans by the ids of their parameters; see `AdamW._states`."""

    def forget_shards(self) -> None:
        """Look parameters and states up again; see `AdamW.forget_shards`."""
        super().forget_shards()
        self._plans.clear()

    def group_update(
        self, group: dict[str, Any], parameters: list[nn.Parameter], gradients: Gradients, clip: Tensor | None
    ) -> Callable[[], None]:
        """Callable that updates one group: its matrices by Muon, other parameters by AdamW."""
        if "row_blocks" not in group:
            return super().group_update(group, parameters, gradients, clip)
        key = tuple(map(id, parameters))
        if key not in self._plans:
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, dtype=self.state_dtype)
            buckets = list(_buckets(parameters, group["row_blocks"]))
            momenta = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
            self._plans[key] = _Plan(buckets, [local(parameter) for parameter in parameters], momenta)
        copies = [gradients.low_precision(parameter) for parameter in parameters]
        return partial(_step, self._plans[key], local_gradients(parameters, gradients), copies, group, clip)


@dataclass(frozen=True)
class _Piece:
    """Matrices, or this rank's rows of one, as a view of one parameter's shard."""

    parameter: int
    """Index of the parameter in the list of parameters."""
    shape: tuple[int, int, int]
    """Shape of the shard, as stacked rows."""
    index: tuple[int | slice, ...]
    sides: tuple[int, int]
    """M and N of each matrix, unsharded."""

    def of(self, shards: list[Tensor]) -> Tensor:
        """View of this piece in a list of tensors that are laid out like the parameters' shards."""
        return shards[self.parameter].view(self.shape)[self.index]


@dataclass(frozen=True)
class _Bucket:
    """Pieces that are updated together."""

    pieces: list[_Piece]
    exchange: RowExchange | None
    """`None` where the matrices are unsharded on this rank."""

    def orthogonalize(self, updates: list[Tensor], iterations: int) -> list[Tensor]:
        """The pieces of the orthogonalized matrices, from the pieces of the matrices."""
        if self.exchange is None:
            return _by_shape(updates, iterations)
        own = [matrix[None] for matrix in self.exchange.gather(updates)]
        return self.exchange.scatter([matrix[0] for matrix in _by_shape(own, iterations)], like=updates[0])


class _Plan(NamedTuple):
    """Buckets of some parameters of one group on one device."""

    buckets: list[_Bucket]
    parameters: list[Tensor]
    momenta: list[Tensor]


def _step(
    plan: _Plan, gradients: list[Tensor], copies: list[Tensor | None], group: dict[str, Any], clip: Tensor | None
) -> None:
    """Take one step of all buckets: decay, momentum, orthogonalized update, and the low-precision copies."""
    gradients = [gradient.contiguous() for gradient in gradients]
    for bucket in plan.buckets:
        updates = [piece.of(gradients).to(torch.float32, copy=True) for piece in bucket.pieces]
        if clip is not None:
            torch._foreach_mul_(updates, clip)
        _add_momentum(updates, [piece.of(plan.momenta) for piece in bucket.pieces], group)
        compute_dtype = torch.bfloat16 if updates[0].is_cuda else torch.float32
        updates = [update.to(compute_dtype) for update in updates]
        updates = [update.float() for update in bucket.orthogonalize(updates, group["newton_schulz_steps"])]
        rates = [-group["lr"] * group["update_rms"] * math.sqrt(max(piece.sides)) for piece in bucket.pieces]
        parameters = [piece.of(plan.parameters) for piece in bucket.pieces]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, torch._foreach_mul(updates, rates))
        for piece, parameter in zip(bucket.pieces, parameters, strict=True):
            if (copy := copies[piece.parameter]) is not None:
                copy.view(piece.shape)[piece.index].copy_(parameter)


def _add_momentum(updates: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> None:
    """Add the gradients in `updates` to the momenta, and replace them by the matrices to orthogonalize, in place."""
    momentum = group["momentum"]
    widened = [buffer.float() for buffer in momenta]  # the buffers themselves where they are fp32
    torch._foreach_mul_(widened, momentum)
    torch._foreach_add_(widened, updates)
    if momenta[0].dtype != torch.float32:
        torch._foreach_copy_(momenta, widened)
    if group["nesterov"]:
        torch._foreach_add_(updates, widened, alpha=momentum)
    else:
        torch._foreach_copy_(updates, widened)


def _by_shape(stacks: list[Tensor], iterations: int) -> list[Tensor]:
    """Stacks [B, M, N] with every matrix orthogonalized; matrices of one shape are computed together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, stack in enumerate(stacks):
        by_shape.setdefault(stack.shape[1:], []).append(index)
    found: dict[int, Tensor] = {}
    for indices in by_shape.values():
        together = orthogonalize(torch.cat([stacks[index] for index in indices]), iterations)
        results = torch.split(together, [stacks[index].shape[0] for index in indices])
        found |= dict(zip(indices, results, strict=True))
    return [found[index] for index in range(len(stacks))]


@dataclass
class _Rows:
    """The pieces of all matrices whose rows one group of ranks shares."""

    group: dist.ProcessGroup
    pieces: list[_Piece] = field(default_factory=list)
    matrices: list[ShardedRows] = field(default_factory=list)


def _buckets(parameters: list[nn.Parameter], row_blocks: int) -> Iterator[_Bucket]:
    """The buckets of these parameters; those that exchange rows are the same on all ranks of their group."""
    unsharded: list[_Piece] = []
    sharded: dict[str, _Rows] = {}
    for index, parameter in enumerate(parameters):
        group = _row_group(parameter)
        if group is None:
            unsharded += _unsharded_pieces(index, parameter, row_blocks)
        else:
            rows = sharded.setdefault(group.group_name, _Rows(group))
            for piece, matrix in _sharded_pieces(index, parameter, row_blocks, group):
                rows.pieces.append(piece)
                rows.matrices.append(matrix)
    sizes = [math.prod(piece.sides) * (piece.index[0].stop - piece.index[0].start) for piece in unsharded]  # type: ignore[union-attr]
    for chosen in fill_buckets(sizes, BUCKET_ELEMENTS):
        yield _Bucket(unsharded[chosen], None)
    for rows in sharded.values():
        loads = [0] * rows.group.size()
        sizes = [math.prod(piece.sides) for piece in rows.pieces]
        for chosen in fill_buckets(sizes, BUCKET_ELEMENTS * rows.group.size()):
            matrices = rows.matrices[chosen]
            exchange = RowExchange(matrices, assign_owners(matrices, loads), rows.group)
            yield _Bucket(rows.pieces[chosen], exchange)


def _row_group(parameter: nn.Parameter) -> dist.ProcessGroup | None:
    """The ranks that share the rows of a parameter's matrices; `None` where each matrix is unsharded on one rank."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    for axis, placement in enumerate(parameter.placements):
        assert not placement.is_shard(parameter.dim() - 1), "fully_shard cuts rows or experts"
        if mesh.size(axis) > 1 and placement.is_shard(parameter.dim() - 2):
            return mesh.get_group(axis)
    return None


def _unsharded_pieces(index: int, parameter: nn.Parameter, row_blocks: int) -> Iterator[_Piece]:
    """Unsharded matrices of a parameter on this rank, in stacks of at most one bucket."""
    shard = local(parameter)
    sides = (shard.shape[-2] // row_blocks, shard.shape[-1])
    stack = shard.numel() // math.prod(sides)
    at_once = max(1, BUCKET_ELEMENTS // math.prod(sides))
    for first in range(0, stack, at_once):
        yield _Piece(index, (stack, *sides), (slice(first, min(first + at_once, stack)),), sides)


def _sharded_pieces(
    index: int, parameter: nn.Parameter, row_blocks: int, group: dist.ProcessGroup
) -> Iterator[tuple[_Piece, ShardedRows]]:
    """This rank's rows of a parameter's matrices, with the rows of all ranks; also of those that have none here."""
    shard, rows, columns = local(parameter), parameter.shape[-2], parameter.shape[-1]
    rank, each = group.rank(), -(-rows // group.size())  # as torch.chunk cuts, and so FSDP2
    firsts = [min(each * source, rows) for source in range(group.size() + 1)]
    experts = 1 if parameter.dim() == 2 else shard.shape[0]
    shape, high = (experts, firsts[rank + 1] - firsts[rank], columns), rows // row_blocks
    for expert in range(experts):
        for block in range(row_blocks):
            bounds = [min(max(first, block * high), (block + 1) * high) for first in firsts]
            here = slice(bounds[rank] - firsts[rank], bounds[rank + 1] - firsts[rank])
            if bounds[rank] == bounds[rank + 1]:
                here = slice(0, 0)
            matrix = ShardedRows(tuple(end - begin for begin, end in pairwise(bounds)), columns)
            yield _Piece(index, shape, (expert, here), (high, columns)), matrix
