"""AdamW: fp32 parameters, moments in fp32 or bf16, and gradient clipping in the same pass over memory.

It works on each rank's own shards, so parameters of any number of meshes are one list. Its state has the names that
torch.optim.AdamW gives it (exp_avg, exp_avg_sq, step), so a checkpoint goes from one type of moments to the other, cast
when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from cherry.optim.protocol import Gradients


class Shards(NamedTuple):
    """One rank's shards of some parameters on one device, as plain tensors that share their memory."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    """Steps taken, 0-dim fp32."""
    copies: list[Tensor | None]
    """Low-precision copies of the parameters, which take the new values too."""


class OwnGradients:
    """Gradients on the parameters themselves, without low-precision copies."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The parameter's `grad`."""
        return parameter.grad

    def low_precision(self, parameter: nn.Parameter) -> None:
        """`None`: there is no low-precision copy."""


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (arXiv 1711.05101) on fp32 parameters.

    With bf16 moments each is widened, moved by the fp32 gradient, and rounded to the nearest: what DeepSeek-V3 does
    (arXiv 2412.19437, section 3.3.3), 4 bytes a parameter less. The step itself takes the moments before rounding.

    Args:
        groups: parameter groups; each may have a `weight_decay` of its own.
        state_dtype: type of the moments, torch.float32 or torch.bfloat16.
    """

    cast_states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    """Names of the states that are kept in `state_dtype`."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]] | Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        # `fused` tells torch's loading where the step counts live: with the parameters, as fp32.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(groups, defaults)
        self.state_dtype = state_dtype
        self._states: dict[tuple[int, ...], tuple[list[Tensor], ...]] = {}
        """This rank's shards of parameters and of their states, by the ids of the parameters. Taking a shard out
        of a DTensor costs the host tens of microseconds, four a parameter, for which the GPU would wait every step."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, updates: Sequence[Callable[[], None]] | None = None
    ) -> None:
        """Take one step.

        Args:
            closure: not taken; torch's checkpoints name it, as None.
            updates: what `ready_step` gathered; `None` steps on the parameters' own gradients, unclipped.
        """
        assert closure is None, "this optimizer takes no closure"
        for update in self._updates(OwnGradients(), None) if updates is None else updates:
            update()

    @torch.no_grad()
    def ready_step(self, gradients: Gradients, clip_coefficient: Tensor | None) -> Callable[[], None]:
        """Callable that takes one step on these gradients, with all host-side lookups done; see `Optimizer`."""
        return partial(self.step, updates=list(self._updates(gradients, clip_coefficient)))

    def forget_shards(self) -> None:
        """Look parameters and states up again: FSDP2 gives uneven shards new memory when a state is loaded."""
        self._states.clear()

    def _updates(self, gradients: Gradients, clip_coefficient: Tensor | None) -> Iterator[Callable[[], None]]:
        """Callables that together take one step, one for each group and device."""
        for group in self.param_groups:
            for device, parameters in parameters_by_device(group["params"], gradients).items():
                coefficient = None if clip_coefficient is None else clip_coefficient.to(device)
                yield self.group_update(group, parameters, gradients, coefficient)

    def group_update(
        self, group: dict[str, Any], parameters: list[nn.Parameter], gradients: Gradients, clip: Tensor | None
    ) -> Callable[[], None]:
        """Callable that updates some parameters of one group, all on one device and with gradients."""
        shards = self._shards(parameters, gradients)
        if shards.parameters[0].is_cuda:
            return partial(_step_triton, shards, group, clip)
        if self.state_dtype == torch.float32 and shards.copies[0] is None:
            return partial(_step_fused, shards, group, clip)
        return partial(step_reference, shards, group, clip)

    def _shards(self, parameters: list[nn.Parameter], gradients: Gradients) -> Shards:
        """This rank's shards of parameters, gradients, states and copies; states are created on first use."""
        key = tuple(map(id, parameters))
        if key not in self._states:
            self._states[key] = self._local_states(parameters)
        own, exp_avgs, exp_avg_sqs, steps = self._states[key]
        copies = [gradients.low_precision(parameter) for parameter in parameters]
        return Shards(own, local_gradients(parameters, gradients), exp_avgs, exp_avg_sqs, steps, copies)

    def _local_states(self, parameters: list[nn.Parameter]) -> tuple[list[Tensor], ...]:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros_like(parameter, dtype=self.state_dtype)
        states = [self.state[parameter] for parameter in parameters]
        means, squares = ([local(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq"))
        return [local(parameter) for parameter in parameters], means, squares, [state["step"] for state in states]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; moments of another type than the configured one are cast.

        torch would cast every state to its parameter's type on the way, and hold all moments in fp32 at once.
        """
        cast = self.cast_states
        kept = {index: {k: s[k] for k in s if k not in cast} for index, s in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": kept})
        self.forget_shards()
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key in cast:
                if key in (stored := state_dict["state"].get(index, {})):
                    self.state[parameter][key] = stored[key].to(parameter.device, self.state_dtype)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradients(parameters: list[nn.Parameter], gradients: Gradients) -> list[Tensor]:
    """This rank's shards of the gradients of parameters that all have one."""
    return [local(found) for parameter in parameters if (found := gradients.gradient(parameter)) is not None]


def parameters_by_device(
    parameters: list[nn.Parameter], gradients: Gradients
) -> dict[torch.device, list[nn.Parameter]]:
    """The parameters that have gradients, by the device that they are on."""
    found: dict[torch.device, list[nn.Parameter]] = {}
    for parameter in parameters:
        if gradients.gradient(parameter) is not None:
            found.setdefault(parameter.device, []).append(parameter)
    return found


def _step_triton(shards: Shards, group: dict[str, Any], clip_coefficient: Tensor | None) -> None:
    """Take an AdamW step on a GPU: one kernel a tensor clips, updates and writes the low-precision copy in one pass."""
    from cherry.optim.triton_adamw import adamw_

    clip = torch.ones((), device=shards.parameters[0].device) if clip_coefficient is None else clip_coefficient
    torch._foreach_add_(shards.steps, 1)
    for parameter, gradient, exp_avg, exp_avg_sq, step, copy in zip(*shards, strict=True):
        adamw_(
            parameter,
            gradient.contiguous(),
            exp_avg,
            exp_avg_sq,
            copy,
            clip,
            step,
            rate=group["lr"],
            decay=group["weight_decay"],
            betas=group["betas"],
            epsilon=group["eps"],
        )


def _step_fused(shards: Shards, group: dict[str, Any], clip_coefficient: Tensor | None) -> None:
    """Take an AdamW step by torch's fused kernel, whose tensors all have one type and whose scale divides gradients."""
    beta1, beta2 = group["betas"]
    scale = None if clip_coefficient is None else clip_coefficient.reciprocal()
    adamw(
        shards.parameters,
        shards.gradients,
        shards.exp_avgs,
        shards.exp_avg_sqs,
        [],
        shards.steps,
        fused=True,
        grad_scale=scale,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def step_reference(shards: Shards, group: dict[str, Any], clip_coefficient: Tensor | None) -> None:
    """Take an AdamW step in plain torch, for moments of any type: the reference that fused kernels are tested against.

    In this order, all in fp32: clip, decay, m, v, then p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps).
    """
    beta1, beta2 = group["betas"]
    lr, eps = group["lr"], group["eps"]
    for parameter, gradient, exp_avg, exp_avg_sq, step, copy in zip(*shards, strict=True):
        step += 1
        gradient = gradient.float() if clip_coefficient is None else gradient.float() * clip_coefficient
        parameter.mul_(1 - lr * group["weight_decay"])
        mean = torch.lerp(exp_avg.float(), gradient, 1 - beta1)
        square = (exp_avg_sq.float() * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        exp_avg.copy_(mean)
        exp_avg_sq.copy_(square)
        # On the step's own device: reading it would wait for the device at every tensor.
        rate = lr / (1 - beta1**step)
        denominator = square.sqrt_().div_((1 - beta2**step).sqrt_()).add_(eps)
        parameter.sub_(mean.mul_(rate).div_(denominator))
        if copy is not None:
            copy.copy_(parameter)
