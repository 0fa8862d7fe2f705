"""Optimizer construction: parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from cherry.job_config import TrainConfig
from cherry.optim.adamw import AdamW

_STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over what is trained; weight decay on matrices only, as is usual for norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # adapters are matrices only
    betas = (config.beta1, config.beta2)
    return AdamW(groups, lr=config.learning_rate, betas=betas, state_dtype=_STATE_DTYPES[config.optimizer_state_dtype])


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


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
