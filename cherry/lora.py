"""Low-rank adapters, LoRA (arXiv 2106.09685): placement, initialization, and merging into the weights.

An adapted projection keeps the name of its weight, so that loading and sharding see the same model. Only the two
matrices of each adapter are trained.

Shapes: N any leading dimensions, D input width, F output width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cherry.distributed.local_part import local_part
from cherry.train_config import LoraConfig
from model.attention import Attention
from model.moe import MoE
from model.transformer import DeepseekV3, initial_values
from model.weights.hf_names import ADAPTER_SUFFIXES

_SHARED = {"shared_gate_up": "gate_up_proj", "shared_down": "down_proj"}
_A, _B = ADAPTER_SUFFIXES


class LoraLinear(nn.Linear):
    """Frozen projection without bias, plus alpha / rank * B A of its input after dropout."""

    def __init__(self, inputs: int, outputs: int, config: LoraConfig) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight.requires_grad_(False)
        self.lora_A_RD = nn.Parameter(torch.empty(config.rank, inputs))
        self.lora_B_FR = nn.Parameter(torch.empty(outputs, config.rank))
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout

    def forward(self, input: Tensor) -> Tensor:
        """Projection of each row, [..., D] -> [..., F]."""
        x_ND = F.dropout(input, self.dropout, self.training)
        low_NR = F.linear(x_ND, self.lora_A_RD) * self.scale
        return F.linear(input, self.weight) + F.linear(low_NR, self.lora_B_FR)


def add_adapters(model: DeepseekV3, config: LoraConfig) -> None:
    """Freeze the model and add adapters to its attention and shared experts, including the MTP module's, in place.

    To be called before sharding, on the meta device; `initialize_adapters` sets the values.
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
    """Initialize A with variance 1 / (3 D), as the paper's code does, and B with zeros.

    Values depend on the seed and the parameter's name, and not on sharding.
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
    """(name, tensor) of a model's state, with adapters merged into their weights (in fp32) and left out.

    Args:
        tensors: (name, tensor) in the order of the model's state dict, where an adapter follows its weight.
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
