"""Silent data corruption: a suspicious step is computed again from the same inputs, and the bits are compared.

A loss or gradient norm that the spike guard refuses comes from the data and the weights, or from a device that computed
something else once. The same inputs give the same bits in the first case alone. A step that is not suspicious costs
nothing; corruption that stays below the guard's bound is not found.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from base.errors import HardwareError
from cherry.distributed.bits import bit_sum
from cherry.distributed.fsdp_hooks import Communication
from cherry.job_config import JobConfig
from cherry.training_model import Network

# Kernels that add in any order move a loss or a norm by far less, a spike's 6 standard deviations are more. Assumed.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class _Evidence:
    """One rank's results of a step's forward and backward passes."""

    losses: Tensor
    """Sums of the three losses over this rank's share, fp64 [3]: what only this rank and those it exchanges tokens
    with can have got wrong."""
    unreduced: list[int]
    """Fingerprints of this rank's gradients before they are reduced; empty without `train.gradient_fingerprints`."""
    unreduced_norms: list[float]
    """Their norms."""
    gradients: list[int]
    """Fingerprints of this rank's shards of the reduced gradients, which any rank can have spoiled."""
    norm: float

    def own_differs(self, other: _Evidence, *, exact: bool) -> bool:
        """Whether what this rank computed by itself is another than before."""
        if exact:
            return not torch.equal(*(e.losses.view(torch.int64) for e in (self, other))) or (
                self.unreduced != other.unreduced
            )
        if not all(map(_close, self.losses.tolist(), other.losses.tolist())):
            return True
        # A token that takes another expert may move a few norms by more than the tolerance: they name no rank alone.
        return self.gradients_differ(other, exact=False) and not all(
            map(_close, self.unreduced_norms, other.unreduced_norms)
        )

    def gradients_differ(self, other: _Evidence, *, exact: bool) -> bool:
        """Whether the reduced gradients are others than before."""
        return self.gradients != other.gradients if exact else not _close(self.norm, other.norm)


class Recheck:
    """Computes suspicious steps of one job again. Every rank calls every method, in the same order.

    Bits are compared on CPUs, and on GPUs with `train.deterministic`. Other GPU kernels may add in another order each
    time: then losses and norms are compared, to 1 %. Error feedback changes with every pass, so with a compressed
    all-reduce the reduced gradients are not compared.
    """

    def __init__(self, config: JobConfig, network: Network, communication: Communication, device: torch.device) -> None:
        self.error: HardwareError | None = None
        """The corruption that was found."""
        self._exact = device.type == "cpu" or config.train.deterministic
        self._network = network
        self._communication = communication
        self._fingerprints = config.train.gradient_fingerprints
        self._dropout = config.lora is not None and config.lora.dropout > 0
        self._device = device
        self._random: list[Tensor] = []
        self._losses = torch.empty(0)
        self._backward: Callable[[], Tensor]

    def compute(self, backward: Callable[[], Tensor]) -> Tensor:
        """Losses that `backward` returns: a step's forward and backward passes, which `check_step` can compute again.

        Args:
            backward: leaves the gradients in the parameters; returns sums of the three losses of this rank, fp64 [3].
        """
        self._backward = backward
        self._communication.fingerprints = [] if self._fingerprints else None
        if self._dropout:
            cuda = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
            self._random = [torch.get_rng_state(), *cuda]
        self._losses = backward()
        return self._losses

    def check_step(self, step: int, reason: str) -> str | None:
        """The corruption in the step just computed, as a text for people; `None` where its inputs give the same again.

        Args:
            step: its number, from 1 on.
            reason: why it is suspicious.
        """
        first = self._evidence(self._losses)
        self._network.zero_grad()
        if self._random:
            torch.set_rng_state(self._random[0])
            for state in self._random[1:]:
                torch.cuda.set_rng_state(state, self._device)
        if self._fingerprints:
            self._communication.fingerprints = []
        second = self._evidence(self._backward())
        own = first.own_differs(second, exact=self._exact)
        spoiled = not self._communication.reductions and first.gradients_differ(second, exact=self._exact)
        found: list[tuple[bool, bool, str]] = [(False, False, "")] * dist.get_world_size()
        dist.all_gather_object(found, (own, spoiled, socket.gethostname()))
        self.error = _verdict(found, f"step {step}: {reason}, and the same inputs, computed again, gave other")
        return None if self.error is None else str(self.error)

    def raise_if_found(self) -> None:
        """Raise the corruption that was found, on every rank.

        Raises:
            HardwareError: it names the rank and host, where they are known.
        """
        if self.error is not None:
            raise self.error

    def _evidence(self, losses: Tensor) -> _Evidence:
        norm = float(self._network.gradient_norm())  # which waits for the reductions
        unreduced = self._communication.fingerprints or []
        own = [bit_sum(gradient) for gradient in self._network.gradients()]
        return _Evidence(
            losses.cpu().clone(),
            _numbers([bits for bits, _ in unreduced]),
            _numbers([norm for _, norm in unreduced]),
            _numbers(own),
            norm,
        )


def _numbers(scalars: Sequence[Tensor]) -> list[Any]:
    numbers: list[Any] = torch.stack(list(scalars)).tolist() if scalars else []
    return numbers


def _close(first: float, second: float) -> bool:
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.isfinite(first) == math.isfinite(second)
    return math.isclose(first, second, rel_tol=_TOLERANCE)


def _verdict(found: Sequence[tuple[bool, bool, str]], told: str) -> HardwareError | None:
    """The error that names the ranks whose own results differ; else, of differing gradients, those it can be."""
    ranks = [rank for rank, (own, _, _) in enumerate(found) if own]
    if not ranks and not any(spoiled for _, spoiled, _ in found):
        return None
    named = bool(ranks) or len(found) == 1
    suspects = ranks or list(range(len(found)))
    hosts = tuple(dict.fromkeys(found[rank][2] for rank in suspects))
    if named:
        where = ", ".join(f"rank {rank} (host {found[rank][2]})" for rank in suspects)
        what = f"{told} bits on {where}: silent data corruption. Test the devices there, or leave the host out."
    else:
        what = (
            f"{told} gradients: silent data corruption in the backward pass of one of {len(found)} ranks, on "
            f"{', '.join(hosts)}. Set train.gradient_fingerprints to have the rank named next time."
        )
    sure = hosts if named or len(hosts) == 1 else ()
    return HardwareError(f"{what} The optimizer did not take the step; run the same command again to resume.", sure)
