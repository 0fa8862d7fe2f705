"""Steps that are skipped, and the way back: the rule at its edges, then real runs over spoiled weights and data."""

from __future__ import annotations

import json
import math
import shutil
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import NonFiniteLossError
from cherry.data.sampler import Sampler
from cherry.spike_guard import WINDOW_STEPS, Figures, StepGuard
from cherry.trainer import Trainer

FINITE = st.floats(min_value=0.01, max_value=20.0)


def filled(losses, norm=1.0, sigma=6.0):
    guard = StepGuard(sigma)
    for loss in losses:
        assert guard.check_step(Figures(loss, norm)) is None
    return guard


def waves(count):
    return [3.0 + 0.1 * math.sin(step) for step in range(count)]


def test_a_spike_is_what_lies_above_six_deviations_of_the_last_128():
    losses = waves(300)
    window = losses[-WINDOW_STEPS:]
    limit = statistics.fmean(window) + 6 * statistics.stdev(window)
    assert filled(losses).check_step(Figures(limit - 1e-9, 1.0)) is None
    guard = filled(losses)
    assert "loss 3.426 above 3.425" in guard.check_step(Figures(limit + 1e-3, 1.0))
    assert "gradient norm 1.001 above 1" in guard.check_step(Figures(3.0, 1.001))
    assert (guard.skipped, guard.consecutive_skips) == (2, 2)
    assert guard.check_step(Figures(3.0, 1.0)) is None
    assert (guard.skipped, guard.consecutive_skips) == (2, 0)


def test_nothing_is_a_spike_before_half_the_window_is_known_or_when_it_is_off():
    assert filled(waves(63)).check_step(Figures(1e9, 1e9)) is None
    assert filled(waves(64)).check_step(Figures(1e9, 1.0)) is not None
    assert filled(waves(300), sigma=None).check_step(Figures(1e9, 1e9)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step(value):
    for sigma in (6.0, None):
        assert StepGuard(sigma).check_step(Figures(value, 1.0)) == f"loss {value}"
        assert StepGuard(sigma).check_step(Figures(1.0, value)) == f"gradient norm {value}"


def test_however_many_outliers_come_none_becomes_the_measure():
    guard = filled(waves(128))
    assert all(guard.check_step(Figures(9.0, 1.0)) is not None for _ in range(500))
    assert guard.consecutive_skips == 500


@settings(max_examples=30, deadline=None)
@given(before=st.lists(FINITE, min_size=60, max_size=200), after=st.lists(FINITE, max_size=60))
def test_a_restored_guard_gives_the_same_verdicts(before, after):
    one = StepGuard(2.0)
    for value in before:
        one.check_step(Figures(value, value))
    other = StepGuard(2.0)
    other.restore(json.loads(json.dumps(one.state())))
    for value in after:
        assert one.check_step(Figures(value, value)) == other.check_step(Figures(value, value))
    assert one.state() == other.state()


@pytest.fixture
def make(mini, prepared_data, tmp_path, group):
    """Makes trainers by the name of their run directory, on a copy of the data that a test may spoil."""
    made = []

    def build(name, *overrides):
        directory = tmp_path / name
        if not directory.exists():
            shutil.copytree(prepared_data, directory / "data")
        made.append(Trainer(mini(*overrides), str(directory)))
        return made[-1]

    yield build
    for trainer in made:
        trainer.close()


def lines(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / name / "train" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_leaves_weights_moments_and_biases_as_they_were(make, optimizer):
    trainer = make("skip", f"train.optimizer={optimizer}")
    trainer._step()
    state = trainer.optimizer.optimizer.state_dict()["state"]
    moments = [value.clone() for entry in state.values() for value in entry.values()]
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.no_grad():
        trainer.model.norm.weight[0] = float("nan")
    record = trainer._step()
    assert record["skipped"] == "loss nan"
    assert (record["step"], record["skipped_steps"], record["tokens"]) == (2, 1, 8 * 32)
    with torch.no_grad():
        trainer.model.norm.weight.copy_(weights["norm.weight"])
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    state = trainer.optimizer.optimizer.state_dict()["state"]
    for before, now in zip(moments, [value for entry in state.values() for value in entry.values()], strict=True):
        assert torch.equal(before, now)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert not any(layer.tokens_per_expert_E.any() for layer in trainer.model.moe_layers())
    assert "skipped" not in trainer._step()


def spoil(directory, trainer, batches):
    """Random tokens in place of what these batches, by their number, will read."""
    path = directory / "data" / "train-00000.bin"
    tokens = np.memmap(path, dtype=np.uint16, mode="r+")
    generator = np.random.default_rng(0)
    length = trainer.config.data.sequence_length
    sampler = Sampler(len(trainer.dataset), trainer.config.seed, trainer.config.train.batch_size)
    for batch in batches:
        for index in sampler.indices(batch * trainer.config.train.batch_size):
            tokens[index * length + 1 : (index + 1) * length] = generator.integers(2, 290, length - 1)
    tokens.flush()


@pytest.mark.slow
def test_spoiled_data_is_skipped_then_passed_over_and_a_resume_goes_on_bit_for_bit(make, tmp_path, capsys):
    options = ["train.steps=88", "train.spike_sigma=4", "train.max_skipped_steps=3", "checkpoint.every_steps=4"]
    trainer = make("spoiled", *options)
    while trainer.progress.step < 75:  # an epoch ends here: what is spoiled is read once
        trainer._step()
    spoil(tmp_path / "spoiled", trainer, [80, 81, 82])
    result = trainer.run()
    said = capsys.readouterr().out
    assert all(f"step {step} skipped: " in said for step in (81, 82, 83))
    assert "step_80: 3 batches passed over, rollback 1" in said
    assert (result["skipped_steps"], result["rollbacks"], result["steps"]) == (3, 1, 88)
    written = lines(tmp_path, "spoiled")
    assert [line["step"] for line in written] == [*range(76, 89)]
    assert [line["rollbacks"] for line in written] == [*[0] * 5, *[1] * 8]
    assert max(line["loss"] for line in written) < 1.5 * written[0]["loss"]
    assert trainer.progress.position == (88 + 3) * 8
    assert trainer.progress.tokens == 88 * 8 * 32
    shutil.rmtree(tmp_path / "spoiled" / "train" / "checkpoints" / "step_88")
    resumed = make("spoiled", *options)
    assert (resumed.progress.step, resumed.progress.position, resumed.progress.rollbacks) == (84, (84 + 3) * 8, 1)
    again = resumed.run()
    assert [line["loss"] for line in lines(tmp_path, "spoiled")] == [line["loss"] for line in written]
    for key in ("loss_last", "skipped_steps", "rollbacks", "heldout_loss", "tokens"):
        assert again[key] == result[key]


def blow_up(trainer):
    """A step at an absurd rate, as a real one, and back to the configured one."""
    trainer._step()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1e25)


def test_weights_that_blew_up_go_back_to_the_checkpoint_before(make, tmp_path, capsys):
    make("blown", "train.steps=8").run()
    trainer = make("blown", "train.steps=20", "train.max_skipped_steps=2")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    blow_up(trainer)
    assert [trainer._step()["skipped"] is not None, trainer.guard.consecutive_skips] == [True, 1]
    trainer._rollback(trainer._step())
    assert "step_8: 3 batches passed over, rollback 1" in capsys.readouterr().out
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (trainer.progress.step, trainer.progress.position, trainer.guard.skipped) == (8, 11 * 8, 2)
    # It blows up again before anything new was saved: that checkpoint led nowhere, the one before it is next.
    blow_up(trainer)
    trainer._step()
    trainer._rollback(trainer._step())
    assert (trainer.progress.step, trainer.progress.position, trainer.progress.rollbacks) == (4, 14 * 8, 2)
    assert trainer.run()["skipped_steps"] == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["train.on_divergence=stop"], "after no rollback"),
        (["train.max_rollbacks=1"], "after 1 rollbacks"),
    ],
)
def test_a_run_that_cannot_be_saved_stops_and_says_what_to_do(make, tmp_path, options, told):
    make("hopeless", "train.steps=4").run()
    # Every step from here on blows the weights up: the next one sees it.
    trainer = make("hopeless", "train.learning_rate=1e30", "train.max_skipped_steps=2", *options)
    with pytest.raises(NonFiniteLossError, match=f"the 2 steps up to it were skipped .* {told}") as caught:
        trainer.run()
    assert "Lower train.learning_rate" in str(caught.value)
    assert (tmp_path / "hopeless" / "train" / "checkpoints" / "step_4" / "COMMITTED").exists()
    assert not (tmp_path / "hopeless" / "train" / "checkpoints" / "step_8").exists()
    assert lines(tmp_path, "hopeless")[-1]["grad_norm"] is None, "JSON has no NaN"
