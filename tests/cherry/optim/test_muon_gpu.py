"""Muon on a GPU, in bf16 and with resident parameters: against the CPU's fp32 steps, and within the planned memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cherry.optim.muon import Muon
from cherry.optim.muon_buckets import BUCKET_BYTES, BUCKET_ELEMENTS
from cherry.train_config import MuonConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
RATE = 0.02


class Resident:
    """bf16 gradients and copies, as a mesh of one has them."""

    def __init__(self, gradients: dict[nn.Parameter, Tensor], copies: dict[nn.Parameter, Tensor]) -> None:
        self._gradients, self._copies = gradients, copies

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        return self._gradients[parameter]

    def low_precision(self, parameter: nn.Parameter) -> Tensor:
        return self._copies[parameter]


def optimizer_of(parameters: list[nn.Parameter], row_blocks: int, state_dtype: torch.dtype) -> Muon:
    groups = [{"params": parameters, "weight_decay": 0.1, "row_blocks": row_blocks}]
    return Muon(groups, [], MuonConfig(), lr=RATE, betas=(0.9, 0.95), state_dtype=state_dtype)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_steps_follow_those_of_the_cpu(state_dtype: torch.dtype) -> None:
    shapes = [(256, 128), (4, 256, 192), (2, 128, 64)]
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=generator) for shape in shapes]
    moved: dict[str, list[Tensor]] = {}
    for device in ("cpu", "cuda"):
        parameters = [nn.Parameter(value.clone().to(device)) for value in first]
        copies = {parameter: parameter.detach().bfloat16() for parameter in parameters}
        optimizer = optimizer_of(parameters, 2, state_dtype)
        for step in range(3):
            drawn = torch.Generator().manual_seed(step)
            gradients = {p: torch.randn(p.shape, generator=drawn).to(device, torch.bfloat16) for p in parameters}
            optimizer.ready_step(Resident(gradients, copies), torch.tensor(0.5, device=device))()
        assert all(torch.equal(copy, parameter.detach().bfloat16()) for parameter, copy in copies.items())
        moved[device] = [p.detach().cpu() - value for p, value in zip(parameters, first, strict=True)]
    for ours, reference in zip(moved["cuda"], moved["cpu"], strict=True):
        assert float((ours - reference).norm() / reference.norm()) < 0.03


def test_a_step_takes_no_more_memory_than_the_plan_allows() -> None:
    """Square matrices, whose Gram matrices are the largest."""
    parameters = [nn.Parameter(torch.randn(24, 2048, 2048, device="cuda"))]
    gradients = {parameters[0]: torch.randn(24, 2048, 2048, device="cuda", dtype=torch.bfloat16)}
    copies = {parameters[0]: parameters[0].detach().bfloat16()}
    optimizer = optimizer_of(parameters, 1, torch.float32)
    optimizer.ready_step(Resident(gradients, copies), None)()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.ready_step(Resident(gradients, copies), None)()
    assert torch.cuda.max_memory_allocated() - held <= BUCKET_BYTES * BUCKET_ELEMENTS
