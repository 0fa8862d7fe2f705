"""Resident parameters: half-precision copies that stay unsharded from step to step.

FSDP2 copies the fp32 parameters to half precision anew in every forward and backward pass, and widens and copies every
gradient (42 bytes a parameter and step by torch 2.13's source: 10 for each of two copies, 22 for a gradient). Here the
copies are kept, and the optimizer writes parameter and copy in one pass. Ranks that share a parameter gather the copies
and reduce gradients in place (cherry/distributed/resident_group.py); on a mesh of one, gradients stay where autograd
put them. The values are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cherry.distributed.fsdp_hooks import Communication
from cherry.distributed.lane import Lane
from cherry.distributed.resident_group import ResidentGroup, inboxes_of, units_of
from cherry.optim.adamw import local
from cherry.optim.grad_norm import total_norm

if TYPE_CHECKING:
    from model.fp8.linear import Fp8Weight


class ResidentParams:
    """The half-precision parameters of a network that `fully_shard` put on its meshes, with their gradients.

    Args:
        network: its mixed precision must have no `reduce_dtype`: FSDP reduces nothing.
        micro_batches: of an optimizer step; with several, gradients are summed in fp32.
    """

    def __init__(self, network: nn.Module, micro_batches: int, communication: Communication) -> None:
        parameters = list(network.parameters())
        device = parameters[0].device
        units = units_of(network, device)
        self._modules = [unit.module for unit in units]
        self._sums: dict[nn.Parameter, Tensor] = {}
        """Gradients in fp32, by fp32 parameter: reduced ones, and sums over micro-batches."""
        for module in self._modules:
            module.set_requires_gradient_sync(False, recurse=False)
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()
        self._lane = Lane(device)
        shared = (self._lane, communication, self._sums, self._prepare)
        inboxes = inboxes_of(units, device, micro_batches)
        self._groups = [ResidentGroup(unit, inbox, *shared) for unit, inbox in zip(units, inboxes, strict=True)]
        entries = [(group, entry) for group in self._groups for entry in group.entries]
        resident = {entry.sharded: entry.resident for _, entry in entries}
        self.resident: Mapping[nn.Parameter, nn.Parameter] = {one: resident[one] for one in parameters}
        """The resident parameter of each fp32 parameter."""
        self._copies = {entry.sharded: group.low_precision(entry) for group, entry in entries}
        self.quantized: Mapping[nn.Parameter, Fp8Weight] = {}
        """The fp8 weights of resident parameters that multiply in fp8: quantized once a step, not in every pass."""
        if micro_batches > 1:
            for group, entry in entries:
                if entry.sharded.requires_grad and not group.reduces:
                    entry.resident.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        self._accumulator(entry.sharded)
                    )

    def _accumulator(self, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def accumulate(resident: Tensor) -> None:
            assert isinstance(resident, nn.Parameter) and resident.grad is not None
            grad = local(resident.grad)
            if parameter in self._sums:
                self._sums[parameter] += grad
            else:
                self._sums[parameter] = grad.to(torch.float32)
            resident.grad = None

        return accumulate

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's part of the gradient of an fp32 parameter: fp32 when it is a sum, else in the resident's type.

        A plain tensor: the GPU would wait while all of them became DTensors.
        """
        self._lane.join()
        if (total := self._sums.get(parameter)) is not None:
            return total
        found = self.resident[parameter].grad
        return None if found is None else local(found)

    def low_precision(self, parameter: nn.Parameter) -> Tensor:
        """The resident values of this rank's part of an fp32 parameter, for the optimizer to write."""
        return self._copies[parameter]

    def gradient_norm(self) -> Tensor:
        """The total norm of the gradients over all ranks' parts, 0-dim fp32."""
        found = [(parameter, self.gradient(parameter)) for parameter in self.resident]
        return total_norm([(parameter, gradient) for parameter, gradient in found if gradient is not None])

    def cache_quantized(self, quantized: Mapping[nn.Parameter, Fp8Weight]) -> None:
        """Cache fp8-quantized weights across steps, keyed by resident parameter."""
        self.quantized = quantized

    def update(self) -> None:
        """Have all ranks take each other's new values, once the optimizer has written its parts."""
        for group in self._groups:
            group.gather()

    def _prepare(self, parameters: Sequence[nn.Parameter]) -> None:
        """Quantize resident parameters again, which have changed."""
        for parameter in parameters:
            if (weight := self.quantized.get(parameter)) is not None:
                weight.requantize(local(parameter.detach()))

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._sums.clear()
        for parameter in self.resident.values():
            parameter.grad = None

    def reshard(self) -> None:
        """Make the fp32 parameters the network's own, as checkpoints want them; the next pass unshards them again."""
        self.finish()
        for module in self._modules:
            module.reshard()

    def unshard(self) -> None:
        """Gather the fp32 parameters, which were changed, into the resident ones, and requantize."""
        for module in self._modules:
            module.unshard()
        for group in self._groups:
            self._prepare([entry.resident for entry in group.entries])

    def finish(self) -> None:
        """Wait for what the ranks still gather, so that resident parameters may be read outside of a pass."""
        for group in self._groups:
            group.finish_gather()
