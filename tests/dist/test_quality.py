"""Options of training quality on two ranks: as on one, resumed exactly, and the same decisions everywhere."""

import shutil

import pytest
import torch

from base.config import dump, load
from cherry.checkpoint.checkpointer import reader_of
from cherry.export import export
from cherry.job_config import JobConfig
from model.weights.pretrained import load_pretrained

pytestmark = pytest.mark.slow


def finished(ended):
    assert ended.returncode == 0, ended.stdout + ended.stderr


def exported(job, *overrides):
    """The newest checkpoint's weights, under the configuration that it was trained with."""
    config = load(job.config, JobConfig, overrides)
    (job.directory / "config.yaml").write_text(dump(config))
    export(str(job.directory), dtype=torch.float32)
    return load_pretrained(str(job.directory / "export"), dtype=torch.float32).state_dict()


def test_adapters_and_documents_apart_are_the_same_on_two_shards(make_job):
    base = make_job("base")
    finished(base.run("--steps=4"))
    exported(base)
    overrides = [f"init_from={base.directory / 'export'}", "lora={rank: 4, dropout: 0.0}", "train.steps=5"]
    overrides += ["data.cross_document_attention=false"]
    flags = [part for override in overrides for part in ("--set", override)]
    weights, losses = [], []
    for ranks in (1, 2):
        job = make_job(f"lora-{ranks}")
        finished(job.run(*flags, ranks=ranks))
        weights.append(exported(job, *overrides))
        losses.append(job.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    before = load_pretrained(str(base.directory / "export"), dtype=torch.float32).state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, weights[0][name])]
    assert {name.split(".")[-2] for name in changed if name.endswith("weight")} == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_up_proj", "down_proj"),
    }
    assert not any("layers.0.mlp" in name or "experts.w" in name for name in changed)
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() < 1e-5, name


def test_bf16_moments_resume_bit_for_bit_and_two_ranks_go_back_and_give_up_together(make_job):
    bf16 = ["--set", "train.optimizer_state_dtype=bf16"]
    whole, again = make_job("whole"), make_job("again")
    finished(whole.run(*bf16, ranks=2))
    stored = reader_of(str(whole.checkpoint(12))).read_metadata().state_dict_metadata
    moments = {entry.properties.dtype for name, entry in stored.items() if ".exp_avg" in name}
    assert moments == {torch.bfloat16}
    shutil.copytree(whole.directory / "train", again.directory / "train")
    shutil.rmtree(again.checkpoint(12))
    finished(again.run(*bf16, ranks=2))
    assert again.losses == whole.losses

    options = ["train.max_skipped_steps=2", "train.max_rollbacks=1"]
    flags = [part for option in options for part in ("--set", option)]
    named = f"--resume_from={again.checkpoint(12)}"  # another rate goes on only from a checkpoint that is named
    ended = again.run(named, "--learning_rate=1e30", "--steps=24", *flags, *bf16, ranks=2)
    assert ended.returncode == 16, ended.stdout + ended.stderr
    assert "step_12: 3 batches passed over, rollback 1" in ended.stdout
    assert "after 1 rollbacks" in ended.stderr
    assert "Traceback" not in ended.stderr
