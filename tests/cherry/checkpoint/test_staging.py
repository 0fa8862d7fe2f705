"""Host snapshots for background saves: what they hold, when training waits for them, and which buffers they reuse."""

import threading

import torch
from torch import nn

from cherry.checkpoint.checkpointer import restore
from cherry.checkpoint.naming import committed_steps
from cherry.checkpoint.staging import Staging
from tests.cherry.checkpoint.saving import HeldCheckpointer, build, saver_of


class WaitedForStaging(Staging):
    """Copies only once something waits for the copy."""

    def __init__(self):
        super().__init__()
        self.waited_for = threading.Event()
        self.buffers = []

    def copy(self, snapshot):
        assert self.waited_for.wait(60)
        staged = super().copy(snapshot)
        self.buffers.append({name: value.data_ptr() for name, value in staged["model"].items()})
        return staged

    def wait_until_copied(self):
        self.waited_for.set()
        super().wait_until_copied()


def test_the_next_optimizer_step_waits_for_the_copy_which_reuses_its_buffers(tmp_path, group, monkeypatch):
    """Weights too large to be copied at once: the copy is not even begun when the step is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monkeypatch.setattr("cherry.checkpoint.checkpointer.Staging", WaitedForStaging)
    saver = saver_of(tmp_path, group, keep_last=9)
    staging, expected = saver._staging, {}
    for step in (1, 2):
        model(torch.randn(4, 200)).sum().backward()
        optimizer.step()
        expected[step] = {name: value.clone() for name, value in model.state_dict().items()}
        staging.waited_for.clear()
        saver.save(step, model, optimizer, {"step": step})
        model(torch.randn(4, 200)).sum().backward()
        optimizer.step()
    saver.close()
    assert not saver.failures
    assert staging.buffers[0] == staging.buffers[1]
    for step, weights in expected.items():
        restore(f"{tmp_path}/step_{step}", model, optimizer, group)
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name]), (step, name)


def test_small_tensors_are_of_the_moment_of_the_save_even_without_a_step(tmp_path, group):
    model, optimizer = build()
    saver = saver_of(tmp_path, group, kind=HeldCheckpointer)
    expected = model[1].bias.detach().clone()
    saver.save(1, model, optimizer, {"step": 1})
    model[1].bias.data.add_(1.0)
    saver.go.set()
    saver.close()
    restore(saver.last_saved, model, optimizer, group)
    assert torch.equal(model[1].bias, expected)


def test_no_memory_for_the_copy_costs_that_save_alone(tmp_path, group, monkeypatch):
    class Full(Staging):
        def _copy_large(self, key, tensor):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("cherry.checkpoint.checkpointer.Staging", Full)
    saver = saver_of(tmp_path, group)
    saver.save(1, *build(), {"step": 1})
    saver.close()
    assert ["allocate memory" in str(error) for error in saver.failures] == [True]
    assert committed_steps(str(tmp_path)) == []


def test_a_snapshot_is_the_state_and_a_second_one_reuses_the_large_buffers():
    large, small = torch.randn(300, 100), torch.randn(4)
    state = {"model": {"large": large, "turned": large.T}, "steps": [small, 3]}
    staging = Staging()
    first = staging.copy(staging.begin(state))
    assert first["model"]["large"].equal(large) and first["model"]["turned"].equal(large.T)
    assert first["steps"][0].equal(small) and first["steps"][1] == 3
    places = [value.data_ptr() for value in first["model"].values()]
    large.add_(1.0)
    second = staging.copy(staging.begin(state))
    assert second["model"]["large"].equal(large)
    assert [value.data_ptr() for value in second["model"].values()] == places
    assert large.data_ptr() not in places
