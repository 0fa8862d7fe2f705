"""Owns AdamW's arithmetic: fp32 parameters, moments in fp32 or bf16, and the clip within the same pass.

It knows nothing of schedules, of who decided to clip, or of meshes: it works on each rank's own shards, so parameters
of any number of meshes are one list. Its state has the names that torch.optim.AdamW gives it (exp_avg, exp_avg_sq,
step), so a checkpoint goes from one type of moments to the other, cast when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ResidentParams(Protocol):
    """Half-precision copies of fp32 parameters that stay between steps; gradients lie on them."""

    @property
    def of(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """The copy of each fp32 parameter."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient of an fp32 parameter."""

    def renew(self) -> None:
        """Requantize what was cast from the copies: they have changed."""


class Shards(NamedTuple):
    """One rank's parts of some parameters on one device, as plain tensors that share their memory."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    """Steps taken, 0-dim fp32."""
    copies: list[Tensor | None]
    """Working copies of the parameters, which take the new values too."""


class Part(NamedTuple):
    """Of a step: parameters of one group on one device."""

    shards: Shards
    group: dict[str, Any]
    clip_coefficient: Tensor | None


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (arXiv 1711.05101) on fp32 parameters.

    With bf16 moments each is widened, moved by the fp32 gradient, and rounded to the nearest: what DeepSeek-V3 does
    (arXiv 2412.19437, section 3.3.3), 4 bytes a parameter less. The step itself takes the moments before rounding.

    Args:
        groups: parameter groups; each may have a `weight_decay` of its own.
        state_dtype: of the moments, torch.float32 or torch.bfloat16.
    """

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
        self.copies: ResidentParams | None = None
        """Set where gradients lie on copies of the parameters, which follow each step."""
        self._parts: dict[tuple[int, ...], tuple[list[Tensor], ...]] = {}
        """Of each list of parameters, by their ids: this rank's parts of them and of their states. Taking a part out of
        a DTensor costs the host tens of microseconds, four a parameter, for which the GPU would wait at every step."""

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        clip_coefficient: Tensor | None = None,
        parts: list[Part] | None = None,
    ) -> None:
        """One step on the gradients that are there.

        Args:
            closure: not taken; torch's checkpoints name it, as None.
            clip_coefficient: 0-dim fp32, what every gradient is multiplied with on the way.
            parts: what `parts` made of these gradients; then their coefficient counts.
        """
        assert closure is None, "this optimizer takes no closure"
        for shards, group, coefficient in self.parts(clip_coefficient) if parts is None else parts:
            if shards.parameters[0].is_cuda:
                _step_triton(shards, group, coefficient)
            elif self.state_dtype == torch.float32 and self.copies is None:
                _step_fused(shards, group, coefficient)
            else:
                step_reference(shards, group, coefficient)
        if self.copies is not None:
            self.copies.renew()

    @torch.no_grad()
    def parts(self, clip_coefficient: Tensor | None = None) -> list[Part]:
        """What a step is made of, for the host to gather while the device still computes gradients."""
        found = []
        for group in self.param_groups:
            for device, parameters in self._by_device(group["params"]).items():
                coefficient = None if clip_coefficient is None else clip_coefficient.to(device)
                found.append(Part(self._shards(parameters), group, coefficient))
        return found

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad if self.copies is None else self.copies.gradient(parameter)

    def _by_device(self, parameters: list[nn.Parameter]) -> dict[torch.device, list[nn.Parameter]]:
        found: dict[torch.device, list[nn.Parameter]] = {}
        for parameter in parameters:
            if self._gradient(parameter) is not None:
                found.setdefault(parameter.device, []).append(parameter)
        return found

    def _shards(self, parameters: list[nn.Parameter]) -> Shards:
        """This rank's part of everything; states are made here the first time."""
        key = tuple(map(id, parameters))
        if key not in self._parts:
            self._parts[key] = self._own_parts(parameters)
        own, exp_avgs, exp_avg_sqs, steps = self._parts[key]
        gradients = [local(g) for parameter in parameters if (g := self._gradient(parameter)) is not None]
        if self.copies is None:
            return Shards(own, gradients, exp_avgs, exp_avg_sqs, steps, [None] * len(own))
        copies: list[Tensor | None] = [self.copies.of[parameter].data for parameter in parameters]
        return Shards(own, gradients, exp_avgs, exp_avg_sqs, steps, copies)

    def forget_parts(self) -> None:
        """Parameters may lie elsewhere from here on: FSDP2 gives uneven shards new memory when a state is loaded."""
        self._parts.clear()

    def _own_parts(self, parameters: list[nn.Parameter]) -> tuple[list[Tensor], ...]:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for key in _MOMENTS:
                    state[key] = torch.zeros_like(parameter, dtype=self.state_dtype)
        states = [self.state[parameter] for parameter in parameters]
        means, squares = ([local(state[key]) for state in states] for key in _MOMENTS)
        return [local(parameter) for parameter in parameters], means, squares, [state["step"] for state in states]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; moments of the other type are cast.

        torch would cast every state to its parameter's type on the way, and hold all moments in fp32 at once.
        """
        kept = {index: {k: s[k] for k in s if k not in _MOMENTS} for index, s in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": kept})
        self.forget_parts()
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key in _MOMENTS:
                if key in (stored := state_dict["state"].get(index, {})):
                    self.state[parameter][key] = stored[key].to(parameter.device, self.state_dtype)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _step_triton(shards: Shards, group: dict[str, Any], clip_coefficient: Tensor | None) -> None:
    """On a GPU, one kernel a tensor: clip, update, and the working copy, in one pass over memory."""
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
    """torch's fused kernel, which wants all four of one type, and divides gradients by a scale."""
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
    """The same step in plain torch, tensor by tensor, for moments of any type: what a fused kernel is tested against.

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
