"""Resident parameters: half-precision copies that stay unsharded from step to step, on a mesh of one rank.

FSDP2 copies the fp32 parameters to half precision anew in every forward and backward pass, and widens and copies every
gradient; with one rank all of that is traffic for nothing (42 bytes a parameter and step by torch 2.13's source: 10 for
each of two copies, 22 for a gradient). Here the copies are kept, gradients stay on them in their own type, and the
optimizer writes parameter and copy in one pass. The values are the same: nothing is summed before the optimizer.
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


class ResidentParams:
    """The half-precision parameters of a network that `fully_shard` put on a mesh of one, with their gradients.

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
        resident = list(network.parameters())
        self.resident: Mapping[nn.Parameter, nn.Parameter] = dict(zip(parameters, resident, strict=True))
        """The resident parameter of each fp32 parameter."""
        self.quantized: Mapping[nn.Parameter, Fp8Weight] = {}
        """The fp8 weights of resident parameters that multiply in fp8: quantized once a step, not in every pass."""
        if micro_batches > 1:
            for parameter in filter(lambda parameter: parameter.requires_grad, resident):
                parameter.register_post_accumulate_grad_hook(self._accumulate)  # type: ignore[no-untyped-call]

    def _accumulate(self, resident: Tensor) -> None:
        assert isinstance(resident, nn.Parameter) and resident.grad is not None
        if resident in self._sums:
            self._sums[resident] += resident.grad
        else:
            self._sums[resident] = resident.grad.to(torch.float32)
        resident.grad = None

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of an fp32 parameter, in the resident parameter's type, or fp32 when it is a sum."""
        resident = self.resident[parameter]
        return self._sums.get(resident, resident.grad)

    def low_precision(self, parameter: nn.Parameter) -> Tensor:
        """The resident values of an fp32 parameter, for the optimizer to write."""
        return self.resident[parameter].data

    def gradient_norm(self) -> Tensor:
        """The total norm of the gradients, 0-dim fp32."""
        gradients = [gradient for parameter in self.resident if (gradient := self.gradient(parameter)) is not None]
        return square_sum(gradients).sqrt()

    def cache_quantized(self, quantized: Mapping[nn.Parameter, Fp8Weight]) -> None:
        """Cache fp8-quantized weights across steps, keyed by resident parameter."""
        self.quantized = quantized

    def requantize(self) -> None:
        """Quantize the cached weights again: the resident parameters have changed."""
        for parameter, weight in self.quantized.items():
            weight.requantize(parameter.detach())

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._sums.clear()
        for parameter in self.resident.values():
            parameter.grad = None

    def reshard(self) -> None:
        """Make the fp32 parameters the network's own, as checkpoints want them; the next pass unshards them again."""
        for module in self._modules:
            module.reshard()

    def unshard(self) -> None:
        """Copy the fp32 parameters, which were changed, to the resident ones, and requantize."""
        for module in self._modules:
            module.unshard()
        self.requantize()
