"""Owns working copies: on a mesh of one, the half-precision parameters that a step computes with stay where they are.

It knows nothing of optimizers. FSDP2 makes its copies of the fp32 parameters anew in every forward and backward pass,
and widens and copies every gradient; with one rank all of that is traffic for nothing (42 bytes a parameter and step by
torch 2.13's source: 10 for each of two copies, 22 for a gradient). Here the copies are kept, gradients stay on them in
their own type, and the optimizer writes parameter and copy in one pass. The values are the same: nothing is summed
before the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from cherry.optim.grad_norm import square_sum

if TYPE_CHECKING:
    from model.fp8.linear import Fp8Weight


class WorkingCopies:
    """The copies of a network that `fully_shard` put on a mesh of one.

    Args:
        network: its mixed precision must have no `reduce_dtype`: gradients are not reduced.
        micro_batches: of an optimizer step; with several, gradients are summed in fp32.
    """

    def __init__(self, network: nn.Module, micro_batches: int) -> None:
        self._modules = [module for module in network.modules() if isinstance(module, FSDPModule)]
        self._sums: dict[nn.Parameter, Tensor] = {}
        parameters = list(network.parameters())
        for module in self._modules:
            module.set_requires_gradient_sync(False, recurse=False)
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()
        copies = list(network.parameters())
        self.of: Mapping[nn.Parameter, nn.Parameter] = dict(zip(parameters, copies, strict=True))
        """The copy of each fp32 parameter."""
        self.operands: Mapping[nn.Parameter, Fp8Weight] = {}
        """What copies are cast to where they multiply in fp8: once a step instead of in every pass."""
        if micro_batches > 1:
            for copy in filter(lambda copy: copy.requires_grad, copies):
                copy.register_post_accumulate_grad_hook(self._add)  # type: ignore[no-untyped-call]

    def _add(self, copy: Tensor) -> None:
        assert isinstance(copy, nn.Parameter) and copy.grad is not None
        if copy in self._sums:
            self._sums[copy] += copy.grad
        else:
            self._sums[copy] = copy.grad.to(torch.float32)
        copy.grad = None

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of an fp32 parameter, in the copies' type, or fp32 when it is a sum."""
        copy = self.of[parameter]
        return self._sums.get(copy, copy.grad)

    def gradient_norm(self) -> Tensor:
        """The total norm of the gradients, 0-dim fp32."""
        gradients = [gradient for parameter in self.of if (gradient := self.gradient(parameter)) is not None]
        return square_sum(gradients).sqrt()

    def hold(self, operands: Mapping[nn.Parameter, Fp8Weight]) -> None:
        """Keep these of copies, by copy, from step to step."""
        self.operands = operands

    def renew(self) -> None:
        """Cast copies to their operands again: they have changed."""
        for copy, operands in self.operands.items():
            operands.requantize(copy.detach())

    def clear(self) -> None:
        """Drop the gradients."""
        self._sums.clear()
        for copy in self.of.values():
            copy.grad = None

    def fold(self) -> None:
        """Make the fp32 parameters the network's own, as checkpoints want them; the next pass copies them again."""
        for module in self._modules:
            module.reshard()

    def unfold(self) -> None:
        """Copy them now, with what copies are cast to: they were changed."""
        for module in self._modules:
            module.unshard()
        self.renew()
