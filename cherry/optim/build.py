"""Optimizer construction: parameter groups, the choice of AdamW or Muon for each, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from cherry.optim.adamw import AdamW
from cherry.optim.muon import Muon
from cherry.optim.protocol import Optimizer
from cherry.train_config import TrainConfig
from model.transformer import Block

_STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Gate and up projections are fused along their rows (model/layers.py, model/experts.py).
_FUSED_PAIRS = ("gate_up_proj.weight", "w13_EFD")
_ROUTER = "mlp.gate.weight"


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer of a configuration over the trained parameters of a model, which is sharded already."""
    return _BUILDERS[config.optimizer](model, config)


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """The matrices of a model's decoder blocks, with how many of equal size are fused along their rows.

    The router is left out: its rows are single experts' directions, not one map between hidden spaces, and the experts'
    biases are tuned to how fast its scores move. Parameters outside of blocks are left out too: the embedding, the head
    and the MTP module's projection.
    """
    found: dict[nn.Parameter, int] = {}
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for name, parameter in block.named_parameters():
            if parameter.dim() > 1 and name != _ROUTER:
                found[parameter] = 2 if name.endswith(_FUSED_PAIRS) else 1
    return found


def _adamw(model: nn.Module, config: TrainConfig) -> AdamW:
    groups = _adamw_groups(_trained(model), config)
    betas = (config.beta1, config.beta2)
    return AdamW(groups, lr=config.learning_rate, betas=betas, state_dtype=_STATE_DTYPES[config.optimizer_state_dtype])


def _muon(model: nn.Module, config: TrainConfig) -> Muon:
    row_blocks, trained = hidden_matrices(model), _trained(model)
    groups = [
        {
            "params": [parameter for parameter in trained if row_blocks.get(parameter) == blocks],
            "weight_decay": config.weight_decay,
            "row_blocks": blocks,
        }
        for blocks in sorted(set(row_blocks.values()))
    ]
    others = _adamw_groups([parameter for parameter in trained if parameter not in row_blocks], config)
    return Muon(
        groups,
        others,
        config.muon,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        state_dtype=_STATE_DTYPES[config.optimizer_state_dtype],
    )


_BUILDERS: Mapping[str, Callable[[nn.Module, TrainConfig], Optimizer]] = {"adamw": _adamw, "muon": _muon}
"""Optimizer builders by `train.optimizer`."""


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adamw_groups(parameters: list[nn.Parameter], config: TrainConfig) -> list[dict[str, object]]:
    """Two groups: weight decay on matrices only, as is usual for norms and biases."""
    groups: list[dict[str, object]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # adapters are matrices only


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up, then the schedule down to its minimum ratio."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    low = config.min_learning_rate_ratio
    return config.learning_rate * (low + (1 - low) * left)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
