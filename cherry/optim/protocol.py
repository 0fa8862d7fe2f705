"""Optimizer protocol, and the protocol by which an optimizer finds gradients and low-precision copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class Gradients(Protocol):
    """Gradients of fp32 parameters, and the low-precision copies that must follow the parameters."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of an fp32 parameter, of any floating type; `None` where there is none."""

    def low_precision(self, parameter: nn.Parameter) -> Tensor | None:
        """The bf16 copy of an fp32 parameter that takes the new value in the same pass; `None` where there is none."""


class Optimizer(Protocol):
    """An optimizer over sharded fp32 parameters.

    Implementations are `torch.optim.Optimizer`s too, because torch.distributed.checkpoint reads and writes those: a
    group's options and each parameter's states, sharded like the parameter.
    """

    param_groups: list[dict[str, Any]]

    def ready_step(self, gradients: Gradients, clip_coefficient: Tensor | None) -> Callable[[], None]:
        """Callable that takes an optimizer step on these gradients, with all host-side lookups done.

        The host calls it while the device still computes, and the returned step after it has waited for the device.

        Args:
            clip_coefficient: 0-dim fp32, multiplies every gradient; `None` leaves them as they are.
        """

    def forget_shards(self) -> None:
        """Look parameters and states up again: FSDP2 gives uneven shards new memory when a state is loaded."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the parameters' own gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Options and states, as torch.optim.Optimizer gives them."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of `state_dict`, cast to the configured type."""
