"""What NVML tells of a node's GPUs."""

from __future__ import annotations

import pytest
import torch

from cherry.watch.node_sampler import NodeSampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]


def test_use_memory_power_and_temperature_of_each_gpu(tmp_path):
    held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    figures = NodeSampler(tmp_path).sample()
    assert 0 <= figures["gpu_0_utilization_percentage"] <= 100
    assert held.nbytes / 1e6 < figures["gpu_0_memory_usage_megabytes"] < figures["gpu_0_memory_total_megabytes"]
    assert 10 < figures["gpu_0_power_usage_watts"] < 2000
    assert 10 < figures["gpu_0_temperature_celsius"] < 120
