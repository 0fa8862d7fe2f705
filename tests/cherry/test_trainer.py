"""One rank's loop: its losses against plain torch, counts and biases, resuming, and what stops it."""

import json
import shutil
import threading

import pytest
import torch
import torch.nn.functional as F

from base.errors import CheckpointError, ConfigError, SupersededError
from cherry.checkpoint.fence import Fence
from cherry.data.collate import mtp_targets
from cherry.trainer import Trainer
from model.transformer import DeepseekV3


@pytest.fixture
def make(mini, prepared_data, tmp_path, group):
    """Makes trainers by the name of their run directory."""
    made = []

    def build(name, *overrides, resume_from=None):
        directory = tmp_path / name
        if not directory.exists():
            directory.mkdir()
            (directory / "data").symlink_to(prepared_data)
        made.append(Trainer(mini(*overrides), str(directory), resume_from=resume_from))
        return made[-1]

    yield build
    for trainer in made:
        trainer.close()


def metrics(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / name / "train" / "metrics.jsonl").read_text().splitlines()]


def losses(tmp_path, name):
    return [line["loss"] for line in metrics(tmp_path, name)]


def test_the_first_step_s_losses_and_norm_are_those_of_plain_torch(make):
    trainer = make("plain", "train.max_grad_norm=1e9")
    model = DeepseekV3(trainer.config.model)
    model.init_weights(trainer.config.seed)
    ((tokens, targets, _),) = trainer.batches.read(0).micro_batches
    out = model.train()(tokens)

    def mean(hidden, wanted):
        return F.cross_entropy(model.logits(hidden).flatten(0, 1), wanted.flatten(), ignore_index=-100)

    loss, mtp_loss = mean(out.hidden_BTD, targets), mean(out.mtp_hidden_BTD, mtp_targets(targets))
    train = trainer.config.train
    (loss + train.mtp_loss_weight * mtp_loss + train.balance_loss_weight * out.balance_loss).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    record = trainer._step()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert record["mtp_loss"] == pytest.approx(mtp_loss.item(), rel=1e-6)
    assert record["balance_loss"] == pytest.approx(out.balance_loss.item(), rel=1e-6)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_token_is_counted_once_and_the_bias_moves_once_a_step(make, recompute):
    trainer = make("counts", "train.gradient_accumulation_steps=4", f"train.activation_checkpointing={recompute}")
    layers = trainer.model.moe_layers()
    config, rate = trainer.config, trainer.config.train.expert_bias_update_rate
    assert len(layers) == 2  # one in the stack, one in the MTP module
    per_layer = config.train.batch_size * config.data.sequence_length * config.model.num_experts_per_tok
    for tokens, targets, _ in trainer.batches.read(0).micro_batches:
        loss, mtp_loss, balance = trainer.network.module(tokens, targets)
        (loss + mtp_loss + balance).backward()
    counts = [layer.tokens_per_expert_E.clone() for layer in layers]
    assert [c.sum().item() for c in counts] == [per_layer] * 2
    for layer in layers:
        layer.tokens_per_expert_E.zero_()
    trainer.optimizer.zero_grad()
    record = trainer._step()
    for layer, count in zip(layers, counts, strict=True):
        assert torch.equal(layer.e_score_correction_bias_E, rate * torch.sign(count.mean() - count))
        assert not layer.tokens_per_expert_E.any()
    worst = max((count.max() / count.mean()).item() for count in counts)
    assert record["expert_load_max_over_mean"] == pytest.approx(worst)


def test_a_run_cut_in_two_equals_the_unbroken_one_bit_for_bit(make, tmp_path, capsys):
    whole = make("whole").run()
    make("cut", "train.steps=12", "train.schedule=cosine").run()
    shutil.rmtree(tmp_path / "cut" / "train" / "checkpoints" / "step_12")
    resumed = make("cut")
    assert resumed.progress.step == 8
    result = resumed.run()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")], "run ends its thread"
    assert "resumed from" in capsys.readouterr().out
    assert losses(tmp_path, "cut") == losses(tmp_path, "whole")
    assert len(losses(tmp_path, "cut")) == 12
    for key in ("loss_first", "loss_last", "heldout_loss", "heldout_bits_per_byte", "tokens"):
        assert result[key] == whole[key]
    named = make("cut", resume_from=str(tmp_path / "whole" / "train" / "checkpoints" / "step_8"))
    assert (named.progress.step, named.progress.tokens) == (8, 8 * 8 * 32)


def test_what_is_reported(make, tmp_path):
    trainer = make("report", "train.evaluate_every_steps=5", "train.log_every_steps=2")
    result = trainer.run()
    lines = metrics(tmp_path, "report")
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [5, 10, 12]
    assert [line["step"] for line in lines if "expert_load" in line] == [10, 12]
    shares = torch.tensor(lines[-1]["expert_load"])
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2), rtol=0, atol=1e-3)
    assert {line["mfu"] for line in lines} == {None}  # no peak is known of a processor
    trainer.peak_flops = 2e9
    assert trainer._mfu(1000.0) == trainer.config.model.flops_per_token(32, with_mtp=True) * 1000.0 / 2e9
    assert lines[-1]["mfu_convention"] == "causal"
    assert result["heldout_loss"] == lines[-1]["heldout_loss"]
    assert result["loss_last"] < lines[0]["loss"]
    assert json.loads((tmp_path / "report" / "train" / "result.json").read_text()) == result


def test_of_fast_steps_the_first_the_evaluated_and_the_last_one_are_printed(make, capfd):
    trainer = make("told", "train.evaluate_every_steps=5")
    trainer.metrics.print_every_s = 3600.0
    trainer.run()
    told = [line.split(" ")[1] for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    assert told == ["1/12", "5/12", "10/12", "12/12"]


def test_a_newer_attempt_stops_the_older_one(make, tmp_path):
    trainer = make("twice")
    Fence(str(tmp_path / "twice" / "train"))
    with pytest.raises(SupersededError):
        trainer.run()
    assert not list((tmp_path / "twice" / "train" / "checkpoints").glob("*/COMMITTED"))


def test_a_checkpoint_of_another_architecture_is_refused(make):
    make("arch", "train.steps=4").run()
    with pytest.raises(CheckpointError, match=r"model\.moe_intermediate_size: the checkpoint has 16, the config 24"):
        make("arch", "model.moe_intermediate_size=24")


def test_data_that_was_prepared_otherwise_is_refused(make):
    with pytest.raises(ConfigError, match=r"data\.sequence_length is 64, the prepared data .* has 32"):
        make("data", "data.sequence_length=64")
