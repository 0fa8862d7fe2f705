"""Saves in the background, commits, pruning, the fence, and what is refused when a checkpoint is read back."""

import logging

import pytest
import torch
from torch import nn

from base import storage
from base.errors import CheckpointError, MissingFileError, SupersededError
from cherry.checkpoint.checkpointer import restore
from cherry.checkpoint.fence import Fence
from cherry.checkpoint.naming import committed_steps, newest_checkpoint
from tests.cherry.checkpoint.saving import HeldCheckpointer, build, saver_of


def test_a_save_is_of_the_moment_it_was_asked_for_and_training_goes_on_meanwhile(tmp_path, group):
    model, optimizer = build()
    saver = saver_of(tmp_path, group, kind=HeldCheckpointer)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    saver.save(1, model, optimizer, {"step": 1})
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()  # reached while the writer waits: saving holds nothing up
    assert not torch.equal(model[0].weight, expected["0.weight"])
    assert newest_checkpoint(str(tmp_path)) is None
    saver.go.set()
    saver.close()
    other, other_optimizer = build(1)
    restore(newest_checkpoint(str(tmp_path)), other, other_optimizer, group)
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name])


def test_every_nth_is_kept_for_good_besides_the_last_ones(tmp_path, group):
    saver = saver_of(tmp_path, group, keep_every_steps=20)
    for step in range(5, 75, 5):
        saver.save(step, *build(), {"step": step})
    saver.close()
    assert committed_steps(str(tmp_path)) == [20, 40, 60, 65, 70]
    again = saver_of(tmp_path, group, keep_every_steps=20)
    again.save(75, *build(), {"step": 75})
    again.close()
    assert committed_steps(str(tmp_path)) == [20, 40, 60, 70, 75]


def test_the_last_ones_are_kept_and_what_was_never_committed_is_not_seen(tmp_path, group):
    model, optimizer = build()
    saver = saver_of(tmp_path, group)
    storage.write_bytes(str(tmp_path / "step_5" / "__0_0.distcp"), b"left by a killed attempt")
    for step in (3, 4, 5):
        saver.save(step, model, optimizer, {"step": step})
    saver.close()
    assert committed_steps(str(tmp_path)) == [4, 5]
    assert (saver.last_saved, saver.last_saved_step) == (f"{tmp_path}/step_5", 5)
    storage.write_bytes(str(tmp_path / "step_9" / ".metadata"), b"cut off")
    assert newest_checkpoint(str(tmp_path)) == f"{tmp_path}/step_5"
    assert storage.read_json(f"{tmp_path}/step_5/state.json") == {"step": 5}


def test_random_states_and_the_optimizer_come_back(tmp_path, group):
    model, optimizer = build()
    saver = saver_of(tmp_path, group, asynchronous=False)
    saver.save(1, model, optimizer, {"step": 1})
    saver.close()
    expected = torch.rand(5)
    other, other_optimizer = build(1)
    torch.manual_seed(99)
    restore(saver.last_saved, other, other_optimizer, group)
    assert torch.equal(torch.rand(5), expected)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, other_optimizer.state[theirs][key])


def test_a_failed_save_is_reported_once_and_the_next_one_counts(tmp_path, group, caplog):
    model, optimizer = build()
    directory = tmp_path / "checkpoints"
    directory.write_text("a file where the directory should be")
    saver = saver_of(directory, group)
    with caplog.at_level(logging.ERROR):
        saver.save(1, model, optimizer, {"step": 1})
        saver.wait()
    assert [type(error) for error in saver.new_failures()] == [MissingFileError]
    assert saver.new_failures() == []
    assert "checkpoint not saved" in caplog.text
    directory.unlink()
    saver.save(2, model, optimizer, {"step": 2})
    saver.close()
    assert saver.new_failures() == []
    assert saver.last_saved_step == 2


def test_another_model_is_refused_with_the_keys_that_differ(tmp_path, group):
    model, optimizer = build()
    saver = saver_of(tmp_path, group, asynchronous=False)
    saver.save(1, model, optimizer, {"step": 1, "model": {"hidden_size": 8, "preset": "tiny"}})
    saver.close()
    with pytest.raises(CheckpointError, match=r"model\.hidden_size: the checkpoint has 8, the config 16"):
        restore(saver.last_saved, model, optimizer, group, expected_model={"hidden_size": 16, "preset": None})
    wider = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 1))
    with pytest.raises(CheckpointError, match="does not fit the configured model"):
        restore(saver.last_saved, wider, torch.optim.AdamW(wider.parameters()), group)


def test_an_attempt_that_was_superseded_commits_nothing(tmp_path, group):
    model, optimizer = build()
    old, newer = (
        saver_of(tmp_path / "checkpoints", group, asynchronous=False, fence=fence)
        for fence in (Fence(str(tmp_path)), Fence(str(tmp_path)))
    )
    newer.save(2, model, optimizer, {"step": 2})
    with pytest.raises(SupersededError, match="attempt 2 took over from attempt 1"):
        old.save(3, model, optimizer, {"step": 3})
    assert committed_steps(str(tmp_path / "checkpoints")) == [2]
    newer.close()
