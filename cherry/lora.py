"""Owns low-rank adapters (arXiv 2106.09685): where they sit, their first values, and how they merge into weights.

It knows nothing of steps or files. An adapted projection keeps its weight's name, so loading and sharding see the same
model; beside it are two small matrices, which alone are trained.

Shapes: N any leading dimensions, D input width, F output width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cherry.distributed.local_part import local_part
from cherry.job_config import LoraConfig
from model.attention import Attention
from model.moe import MoE
from model.transformer import DeepseekV3, initial_values
from model.weights.hf_names import ADAPTER_SUFFIXES

_SHARED = {"shared_gate_up": "gate_up_proj", "shared_down": "down_proj"}
_A, _B = ADAPTER_SUFFIXES


class LoraLinear(nn.Linear):
    """A frozen projection without a bias, plus alpha / rank * B A on its dropped-out input."""

    def __init__(self, inputs: int, outputs: int, config: LoraConfig) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight.requires_grad_(False)
        self.lora_A_RD = nn.Parameter(torch.empty(config.rank, inputs))
        self.lora_B_FR = nn.Parameter(torch.empty(outputs, config.rank))
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout

    def forward(self, input: Tensor) -> Tensor:
        """Project each row."""
        x_ND = F.dropout(input, self.dropout, self.training)
        low_NR = F.linear(x_ND, self.lora_A_RD) * self.scale
        return F.linear(input, self.weight) + F.linear(low_NR, self.lora_B_FR)


def add_adapters(model: DeepseekV3, config: LoraConfig) -> None:
    """Freeze the model and put adapters on its attention and shared experts, the MTP module's included, in place.

    Before sharding, on the meta device; `initialize_adapters` gives values.
    """
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, Attention):
            _adapt(module, set(config.targets or _projections(module)), config)
        elif isinstance(module, MoE) and module.shared_experts is not None:
            names = {leaf for name, leaf in _SHARED.items() if config.targets is None or name in config.targets}
            _adapt(module.shared_experts, names, config)


def _projections(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if isinstance(child, nn.Linear)]


def _adapt(module: nn.Module, names: set[str], config: LoraConfig) -> None:
    for name in _projections(module):
        if name in names:
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            with linear.weight.device:
                setattr(module, name, LoraLinear(linear.in_features, linear.out_features, config))


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int) -> None:
    """A from the seed and its name, of variance 1 / (3 D) as the paper's code draws it; B zero: nothing changes yet.

    The values do not depend on how the parameters are sharded.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(_B):
            parameter.zero_()
        elif name.endswith(_A):
            std = 1.0 / math.sqrt(3 * parameter.shape[1])
            whole_RD = initial_values(name, parameter.shape, seed=seed, std=std)
            local, box = local_part(parameter)
            local.copy_(whole_RD[tuple(slice(*bounds) for bounds in box)])


def merged(tensors: Iterable[tuple[str, Tensor]], config: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """A model's state with each adapter added to its weight, in fp32, and left out.

    Args:
        tensors: name and value, a weight's adapter right behind it, as in the model's state dict.
    """
    held: tuple[str, Tensor] | None = None
    low_RD: Tensor | None = None
    for name, tensor in tensors:
        if name.endswith(_A):
            low_RD = tensor
        elif name.endswith(_B):
            assert held is not None and low_RD is not None and held[0] == name.removesuffix(_B) + ".weight"
            delta_FD = tensor.float() @ low_RD.float() * (config.alpha / config.rank)
            held = (held[0], (held[1].float() + delta_FD).to(held[1].dtype))
        else:
            if held is not None:
                yield held
            held = (name, tensor)
    if held is not None:
        yield held
