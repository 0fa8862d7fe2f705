"""Started by the launcher, any number of ranks trains the same model; test_layouts.py holds every layout to that."""

import shutil

import pytest
import torch

from cherry.export import export
from model.weights.pretrained import load_pretrained

pytestmark = pytest.mark.slow


def weights(job):
    """The newest checkpoint's, by way of its export: put together from every rank's shards."""
    export(str(job.directory), dtype=torch.float32)
    return load_pretrained(str(job.directory / "export"), dtype=torch.float32).state_dict()


def test_ranks_accumulation_and_recompute_change_nothing(make_job):
    one = make_job("one")
    # AdamW divides by the gradient's own size, so rounding grows with every step: weights are compared early.
    saves = ["--set", "checkpoint.every_steps=5", "--steps=5"]
    assert one.run(*saves).returncode == 0
    expected = weights(one)
    variants = {
        "shard 2, accumulate 2": (2, ["--gradient_accumulation_steps=2"]),
        "accumulate 8": (1, ["--gradient_accumulation_steps=8"]),
        "recompute": (2, ["--set", "train.activation_checkpointing=full"]),
    }
    for number, (name, (ranks, flags)) in enumerate(variants.items()):
        job = make_job(str(number))
        ended = job.run(*flags, *saves, ranks=ranks)
        assert ended.returncode == 0, f"{name}: {ended.stdout}{ended.stderr}"
        for ours, reference in zip(job.metrics, one.metrics, strict=True):
            assert ours.keys() == reference.keys()
            for key in {"loss", "mtp_loss", "grad_norm", "heldout_loss"} & reference.keys():
                assert ours[key] == pytest.approx(reference[key], rel=1e-5), f"{name}: {key}"
            assert ours["expert_load_max_over_mean"] == pytest.approx(reference["expert_load_max_over_mean"], rel=0.02)
        for key, value in weights(job).items():
            assert (value - expected[key]).abs().max() < 1e-5, f"{name}: {key}"


def test_two_ranks_resume_bit_for_bit_and_one_rank_goes_on_in_the_same_order(make_job):
    whole = make_job("whole")
    assert whole.run(ranks=2).returncode == 0
    for ranks, name in ((2, "again"), (1, "fewer")):
        job = make_job(name)
        shutil.copytree(whole.directory / "train", job.directory / "train")
        shutil.rmtree(job.checkpoint(12))
        ended = job.run(ranks=ranks)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "resumed from" in ended.stdout
        assert "8 steps" in ended.stdout
        if ranks == 2:
            assert job.losses == whole.losses
        else:
            assert job.losses == pytest.approx(whole.losses, rel=1e-5)
        logs = [job.directory / "train" / f"rank-{rank}.log" for rank in range(ranks)]
        assert [text.read_text().count("resumed from") for text in logs] == [1, 0][:ranks]
        assert [line["step"] for line in job.metrics] == list(range(1, 13))
