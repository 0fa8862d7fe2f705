"""Expert parallelism on one node: every rank gathers all ranks' tokens, and returns the sums of its own experts.

A token goes to most ranks of a node anyway: it has K experts, and these are on most of S <= K ranks. So tokens are
gathered whole, by copy engine, which takes nothing from matmuls; no count decides what is sent, so it is on its way
before the router has chosen. A rank sorts the slots of its own experts out, runs them as one rank runs all, and sends
each token's partial sum back, where the S of them are added in fp32. (S - 1) rows a token travel each way; all-to-all
sends a row for each of the K (S - 1) / S slots elsewhere, by kernels that matmuls wait for.

The tokens travel while the router works, the sums while the shared experts do; backward the same way round. One number
comes to the host in a layer, how many rows its experts have; the sorting keeps the GPU busy meanwhile.

Shapes: S ranks of the group, N token of a rank (equal on all of them), M = S N, K top-k slot, L experts of this rank, D
hidden, X = 2 K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from cherry.distributed.expert_parallel import own_slots
from model.experts import Experts


class Exchange(Protocol):
    """All-to-all of equal parts beside other work, as cherry/distributed/peer_exchange.py has it for GPUs of a node."""

    ranks: int
    rank: int
    on_bytes_sent: Callable[[int], None] | None

    def start(self, parts: Tensor) -> None:
        """Send part s of `parts` [S, ...] to rank s."""
        ...

    def finish(self) -> None:
        """Wait for what comes."""
        ...

    def box(self, shape: torch.Size) -> Tensor:
        """What came [S, ...], until the next `start`."""
        ...


class GatherDispatcher:
    """Gather of tokens to the experts of all ranks of a group, and the reduction of their outputs.

    Args:
        tokens: exchanges tokens and sums of outputs; rank s holds experts s * L to (s + 1) * L - 1.
        routing: exchanges what the router says of them.
    """

    def __init__(self, tokens: Exchange, routing: Exchange) -> None:
        self._tokens, self._routing = tokens, routing

    def count_bytes(self, on_bytes_sent: Callable[[int], None]) -> None:
        """Call `on_bytes_sent` with the bytes that every exchange sends to other ranks."""
        self._tokens.on_bytes_sent = self._routing.on_bytes_sent = on_bytes_sent

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def send(self, x_ND: Tensor) -> Tensor:
        """The tokens of all ranks [S, N, D], which arrive until `__call__`."""
        return cast(Tensor, _Gather.apply(self._tokens, x_ND))  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, experts: Experts, sent: Tensor, weight_NK: Tensor, experts_NK: Tensor, counts_E: Tensor
    ) -> Tensor:
        """Sums of this rank's experts for the tokens of all ranks [S, N, D], on their way to these."""
        # Expert indices are sent with the weights: fp32 holds them exactly.
        routing_NX = torch.cat([weight_NK.float(), experts_NK.float()], dim=1)
        routing_SNX = _Gathered.apply(self._routing, _Gather.apply(self._routing, routing_NX))  # type: ignore[no-untyped-call]
        weight_MK, experts_MK = routing_SNX.flatten(0, 1).chunk(2, dim=1)
        local = counts_E.shape[0] // self._tokens.ranks
        own_MK, counts_L = own_slots(experts_MK.detach().long(), self._tokens.rank, local)
        rows = _to_host(counts_L.sum())
        x_SND = _Gathered.apply(self._tokens, sent)  # type: ignore[no-untyped-call]
        out_MD = experts.run_routed(x_SND.flatten(0, 1), weight_MK, own_MK, counts_L, rows)
        return cast(Tensor, _Reduce.apply(self._tokens, out_MD.view_as(x_SND)))  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def receive(self, out: Tensor) -> Tensor:
        """Sum over each token's top-k slots of weight * expert(x) [N, D], of all ranks' experts."""
        return cast(Tensor, _Reduced.apply(self._tokens, out))  # type: ignore[no-untyped-call]


def _to_host(number: Tensor) -> Callable[[], int]:
    """Function that waits for a number of the device, but not for what the device is given later."""
    if not number.is_cuda:
        return lambda: int(number)
    copy = torch.empty((), dtype=number.dtype, pin_memory=True)
    copy.copy_(number, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def wait() -> int:
        event.synchronize()
        return int(copy)

    return wait


# An exchange begins in one function and is finished by the next, with other work between the two. Backward each is the
# other kind: what was gathered is reduced, from `_Gathered` to `_Gather`, and what was reduced is gathered.


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, x: Tensor) -> Tensor:
        ctx.exchange = exchange
        return _begin_gather(exchange, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, _finish_reduce(ctx.exchange, grads[0].shape)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, box: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.finish()
        return exchange.box(box.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.exchange.start(grads[0].contiguous())
        return None, grads[0]


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, parts: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.start(parts.contiguous())
        return parts.view_as(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.exchange.finish()
        return None, grads[0]


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, parts: Tensor) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(parts.new_empty(0))
        return _finish_reduce(exchange, parts.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        # Activation recompute starts where something saved is asked for: here, as it exchanges too.
        _ = ctx.saved_tensors
        return None, _begin_gather(ctx.exchange, grads[0])


def _begin_gather(exchange: Exchange, x: Tensor) -> Tensor:
    """The box [S, ...] that all ranks' tensors will be in."""
    parts = x.expand(exchange.ranks, *x.shape)
    exchange.start(parts)
    return exchange.box(parts.shape)


def _finish_reduce(exchange: Exchange, shape: torch.Size) -> Tensor:
    """Sum over ranks of the parts that came, in fp32, in their type."""
    exchange.finish()
    return exchange.box(shape).sum(0)
