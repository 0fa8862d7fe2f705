"""Projections of attention rounded in the order in which data passes them, each on inputs from rounded ones.

A stage is a list of inputs, and an input a list of the layers that read it. All inputs of a stage are captured in one
run over the calibration documents; the next stage's run goes through this one's rounded weights, as in GPTQ's code
with `true_sequential`.

Shapes: I input channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.calibration.awq import ScalingSearch, fold_norm, fold_values
from model.calibration.int4_weight import Int4Weight
from model.calibration.method import Method
from model.calibration.second_moment import SecondMoment
from model.layers import RMSNorm

Stages = Sequence[Sequence[Sequence[nn.Linear]]]
Run = Callable[[], None]
"""Function that takes all calibration tokens through the layers of the stages."""


class Rounding(NamedTuple):
    """What is rounded in one block, how, and what came of it."""

    method: Method
    wanted: set[Tensor]
    rounded: dict[Tensor, Int4Weight]
    """Filled as it goes on; the parameter itself then holds the rounded values."""
    folded: dict[Tensor, None]
    """Parameters that AWQ changed, in order; those that are rounded afterwards are among them."""

    def chosen(self, linears: Sequence[nn.Linear]) -> list[nn.Linear]:
        """Those of `linears` that are to be rounded."""
        return [linear for linear in linears if linear.weight in self.wanted]

    def round(self, linear: nn.Linear, moment: SecondMoment | None) -> None:
        """Round one layer's weight in place."""
        found = self.method.round(linear.weight.detach(), moment)
        self.rounded[linear.weight] = found
        with torch.no_grad():
            linear.weight.copy_(found.dequantized())


def round_stages(stages: Stages, run: Run, rounding: Rounding) -> None:
    """Round the chosen layers of the stages, one stage after the other."""
    for stage in stages:
        inputs = [chosen for linears in stage if (chosen := rounding.chosen(linears))]
        if not inputs:
            continue
        moments: list[SecondMoment | None] = [None] * len(inputs)
        if rounding.method.needs_inputs:
            moments[:] = captured([linears[0] for linears in inputs], run)
        for linears, moment in zip(inputs, moments, strict=True):
            for linear in linears:
                rounding.round(linear, moment)


def captured(linears: Sequence[nn.Linear], run: Run) -> list[SecondMoment]:
    """Second moment of each layer's inputs in a run."""
    moments = [SecondMoment(linear.in_features, linear.weight.device) for linear in linears]
    with _hooks(linears, moments), torch.no_grad():
        run()
    return moments


@contextmanager
def _hooks(linears: Sequence[nn.Linear], moments: Sequence[SecondMoment]) -> Iterator[None]:
    def hook_of(moment: SecondMoment) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, arguments: moment.add(arguments[0])

    handles = [
        linear.register_forward_pre_hook(hook_of(moment)) for linear, moment in zip(linears, moments, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_stages(attention: Attention) -> Stages:
    """Projections of attention: those of the hidden state, those of the latents, the output."""
    if not attention.low_rank_query:
        return [[[attention.q_proj, attention.kv_a_proj_with_mqa]], [[attention.kv_b_proj]], [[attention.o_proj]]]
    first = [[attention.q_a_proj, attention.kv_a_proj_with_mqa]]
    return [first, [[attention.q_b_proj], [attention.kv_b_proj]], [[attention.o_proj]]]


def fold_attention(norm: RMSNorm, attention: Attention, run: Run, rounding: Rounding) -> None:
    """AWQ's scalings of attention's inputs, folded into norms and kv_b_proj; weights are not rounded yet."""
    latent_norms = [attention.q_a_layernorm] if attention.low_rank_query else []
    norms = [norm, *latent_norms, attention.kv_a_layernorm]
    inputs = [linears for stage in attention_stages(attention) for linears in stage]
    moments = captured([linears[0] for linears in inputs], run)
    for place, (linears, moment) in enumerate(zip(inputs, moments, strict=True)):
        if not (chosen := rounding.chosen(linears)):
            continue
        scaling_I = scaling([linear.weight for linear in chosen], moment, rounding.method)
        changed = [linear.weight for linear in linears]
        if place < len(norms):
            fold_norm(norms[place], list(linears), scaling_I)
            changed.append(norms[place].weight)
        else:
            fold_values(attention, scaling_I)
            changed.append(attention.kv_b_proj.weight)
        rounding.folded.update(dict.fromkeys(changed))


def scaling(weights: Sequence[Tensor], moment: SecondMoment, method: Method) -> Tensor:
    """AWQ's scaling [I] of one input that these weights read."""
    search = ScalingSearch(moment.mean(), method.group, method.scale_dtype)
    for weight in weights:
        search.add(weight.detach(), moment.sum_II)
    return search.best()
