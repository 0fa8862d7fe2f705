"""The one table of accelerators: found by the driver's names, and the same peak in a plan and in the trainer's MFU."""

from __future__ import annotations

import pytest
import torch

from cherry.hardware import GPUS, find_gpu
from cherry.job_config import JobConfig
from cherry.metrics import peak_flops
from cherry.planner.step_time import step_time
from cherry.planner.workload import Workload

DRIVER_NAMES = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H800": "H800",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
}


def test_every_gpu_is_found_by_the_name_that_its_driver_gives_it() -> None:
    assert {name: gpu.name for name in DRIVER_NAMES if (gpu := find_gpu(name)) is not None} == DRIVER_NAMES
    assert set(DRIVER_NAMES.values()) == {name for name, gpu in GPUS.items() if not gpu.shared_memory}


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA RTX 4090 Laptop GPU", "unknown"])
def test_a_name_that_only_contains_another_is_not_it(name: str) -> None:
    assert find_gpu(name) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", DRIVER_NAMES)
def test_a_plan_and_the_trainer_divide_by_the_same_peak(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = find_gpu(name)
    assert gpu is not None
    if precision not in gpu.flops:
        assert (gpu.name[:4], precision) == ("A100", "fp8")
        return
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    model = JobConfig.model_validate({"name": "n", "model": {"preset": "16b"}}).model
    axes = {"replicate": 1, "shard": 1, "context": 1, "expert": 1, "micro_sequences": 1, "accumulation": 1}
    work = Workload(model, gpu, gpus_per_node=1, sequence_length=4096, precision=precision, recompute="none", **axes)
    step = step_time(work)
    planned = step.tokens_per_s_gpu * model.flops_per_token(4096, with_mtp=True) / step.mfu(causal=True)
    assert planned == pytest.approx(peak_flops(torch.device("cuda"), precision))
