"""Training on a CUDA GPU, sharded over a mesh of one: bf16 and fp32 follow fp32 on the CPU, and a resume goes on."""

import shutil

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]

CONFIG = """\
name: gpu
model: {preset: tiny, vocab_size: 600}
data: {source: "SOURCE", sequence_length: 32, heldout_fraction: 0.2}
train: {steps: 24, batch_size: 8, warmup_steps: 4, learning_rate: 1.0e-3}
checkpoint: {every_steps: 8, keep_last: 3}
"""
# bf16 has 8 bits of mantissa, and near ties of the router fall otherwise: losses differ, but not by much.
BF16_TOLERANCE = 5e-3
FP32_TOLERANCE = 1e-5
FP8_TOLERANCE = 1e-2


@pytest.fixture
def run(make_job, prepared_data, tmp_path):
    """Runs a job by name with train.py's flags."""
    path = tmp_path / "gpu.yaml"
    path.write_text(CONFIG.replace("SOURCE", str(prepared_data.parent)))

    def start(name, *flags, before=None):
        job = make_job(name)
        job.config = path
        if before is not None:
            before(job)
        ended = job.run(*flags)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return job

    return start


def test_a_gpu_trains_as_the_cpu_does_and_goes_on_after_a_resume(run, monkeypatch):
    bf16 = run("bf16", "--set", "train.precision=bf16")
    fp32 = run("fp32")

    def resume_at_16(job):
        shutil.copytree(bf16.directory / "train", job.directory / "train")
        shutil.rmtree(job.checkpoint(24))

    resumed = run("resumed", "--set", "train.precision=bf16", before=resume_at_16)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cpu = run("cpu")

    assert cpu.losses[-1] < 0.9 * cpu.losses[0]
    assert fp32.losses == pytest.approx(cpu.losses, rel=FP32_TOLERANCE)
    assert bf16.losses == pytest.approx(cpu.losses, rel=BF16_TOLERANCE)
    assert bf16.metrics[-1]["heldout_loss"] == pytest.approx(cpu.metrics[-1]["heldout_loss"], rel=BF16_TOLERANCE)
    assert 0 < bf16.metrics[-1]["mfu"] < 1
    # The forward pass is the same to the bit; gradients are summed by atomics, in an order of the moment.
    assert resumed.losses[:17] == bf16.losses[:17]
    assert resumed.losses == pytest.approx(bf16.losses, rel=BF16_TOLERANCE)
    print({"cpu": cpu.losses[-3:], "fp32": fp32.losses[-3:], "bf16": bf16.losses[-3:], "resumed": resumed.losses[-3:]})


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_fp8_follows_bf16_and_goes_on_after_a_resume(run, compiled):
    wide = ("--set", "model.moe_intermediate_size=128", "--set", f"train.compile={compiled}")
    bf16 = run("wide", *wide, "--set", "train.precision=bf16")
    fp8 = run("fp8", *wide, "--set", "train.precision=fp8")

    def resume_at_16(job):
        shutil.copytree(fp8.directory / "train", job.directory / "train")
        shutil.rmtree(job.checkpoint(24))

    resumed = run("fp8 resumed", *wide, "--set", "train.precision=fp8", before=resume_at_16)
    assert fp8.losses == pytest.approx(bf16.losses, rel=FP8_TOLERANCE)
    assert fp8.losses != pytest.approx(bf16.losses, rel=1e-6)
    assert fp8.metrics[-1]["heldout_loss"] == pytest.approx(bf16.metrics[-1]["heldout_loss"], rel=FP8_TOLERANCE)
    assert resumed.losses[:17] == fp8.losses[:17]
    assert resumed.losses == pytest.approx(fp8.losses, rel=FP8_TOLERANCE)
