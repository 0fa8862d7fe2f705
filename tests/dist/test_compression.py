"""Training with compressed reduction: bit for bit after a resume, on another mesh too, and its loss beside fp32's."""

import shutil

import pytest

pytestmark = pytest.mark.slow

COMPRESSED = ("--set", "parallel.replicate=2", "--set", "communication.replicate=int8", "--gradient_accumulation_steps=2")


def test_a_compressed_run_cut_in_two_equals_the_unbroken_one_bit_for_bit(make_job):
    whole = make_job("whole")
    ended = whole.run(*COMPRESSED, "--set", "communication.reduce_dtype=bf16", ranks=4)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    job = make_job("again")
    shutil.copytree(whole.directory / "train", job.directory / "train")
    shutil.rmtree(job.checkpoint(12))
    ended = job.run(*COMPRESSED, "--set", "communication.reduce_dtype=bf16", ranks=4)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "8 steps" in ended.stdout
    assert job.losses == whole.losses
