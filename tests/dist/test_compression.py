"""Training with compressed reduction: bit for bit after a resume, and its loss beside the uncompressed one."""

import shutil

import pytest

pytestmark = pytest.mark.slow

COMPRESSED = (
    "--set",
    "parallel.replicate=2",
    "--set",
    "communication.replicate=int8",
    "--gradient_accumulation_steps=2",
)


def test_a_compressed_run_cut_in_two_equals_the_unbroken_one_and_stays_beside_the_uncompressed(make_job):
    plain, whole, job = make_job("plain"), make_job("whole"), make_job("again")
    assert plain.run().returncode == 0
    ended = whole.run(*COMPRESSED, ranks=2)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    shutil.copytree(whole.directory / "train", job.directory / "train")
    shutil.rmtree(job.checkpoint(12))
    ended = job.run(*COMPRESSED, ranks=2)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "8 steps" in ended.stdout
    assert job.losses == whole.losses
    assert whole.losses == pytest.approx(plain.losses, rel=5e-3)
    assert whole.losses[1:] != pytest.approx(plain.losses[1:], rel=1e-6)  # so it was compressed
    for ours, reference in zip(whole.metrics, plain.metrics, strict=True):
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0.05)
        assert ours["bytes_on_wire"].keys() == {"replicate.all_to_all", "replicate.all_gather"}
        assert 0.25 < ours["reduction_bytes_over_fp32"] < 0.3  # blocks are filled up, which shows in a small model
        assert (reference["bytes_on_wire"], reference["bytes_on_wire_total"]) == ({}, 0)
