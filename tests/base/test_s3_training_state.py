"""Training on an object store: documents read from it, state saved to it and restored, weights written and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from s3fs import S3FileSystem
from torch import nn

from base import storage
from base.errors import CheckpointError, MissingFileError, StorageError
from cherry.checkpoint.checkpointer import Checkpointer, restore
from cherry.checkpoint.naming import committed_steps, newest_checkpoint
from cherry.data.prepare import prepare
from cherry.data.sampler import Sampler
from cherry.data.shards import TokenDataset
from cherry.job_config import DataConfig
from model.model_config import ModelConfig
from model.transformer import DeepseekV3
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf

TEXT = "The quick brown fox jumps over the lazy dog, and then does so again. "


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, first: int, last: int) -> None:
    for step in range(first, last):
        batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_resume_from_the_object_store_ends_where_an_unbroken_run_ends(
    s3: str, group: dist.ProcessGroup, asynchronous: bool
) -> None:
    directory = f"{s3}/run/checkpoints"
    assert newest_checkpoint(directory) is None
    model, optimizer = build(0)
    saver = Checkpointer(directory, keep_last=2, asynchronous=asynchronous, group=group, fence=None)
    for step in (2, 4, 6):
        train(model, optimizer, first=step - 2, last=step)
        saver.save(step, model, optimizer, {"step": step, "tokens": 10 * step})
    saver.close()
    assert saver.failures == []
    assert saver.last_saved == newest_checkpoint(directory) == f"{directory}/step_6"
    assert committed_steps(directory) == [4, 6]  # pruned to the last two
    train(model, optimizer, first=6, last=9)

    resumed, resumed_optimizer = build(1)
    record = restore(f"{directory}/step_4", resumed, resumed_optimizer, group)
    assert (record["step"], record["tokens"]) == (4, 40)
    train(resumed, resumed_optimizer, first=4, last=9)
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_broken_or_unfinished_checkpoint_on_the_object_store_is_refused(s3: str, group: dist.ProcessGroup) -> None:
    directory = f"{s3}/checkpoints"
    model, optimizer = build(0)
    saver = Checkpointer(directory, keep_last=5, asynchronous=False, group=group, fence=None)
    saver.save(1, model, optimizer, {"step": 1})
    saver.save(2, model, optimizer, {"step": 2})
    saver.close()
    shard = f"{directory}/step_2/__0_0.distcp"
    content = storage.read_bytes(shard)
    storage.write_bytes(shard, content[:-100])
    with pytest.raises(CheckpointError, match=rf"__0_0\.distcp: {len(content) - 100} bytes, {len(content)} were"):
        restore(f"{directory}/step_2", model, optimizer, group)
    storage.write_bytes(f"{directory}/step_3/__0_0.distcp", content)
    with pytest.raises(MissingFileError, match="no finished output"):
        restore(f"{directory}/step_3", model, optimizer, group)
    storage.remove_tree(f"{directory}/step_2")
    assert newest_checkpoint(directory) == f"{directory}/step_1"


def test_an_outage_of_the_object_store_costs_a_checkpoint_and_not_the_run(
    s3: str, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = f"{s3}/checkpoints"
    model, optimizer = build(0)
    saver = Checkpointer(directory, keep_last=5, asynchronous=True, group=group, fence=None)
    saver.save(1, model, optimizer, {"step": 1})
    saver.wait()
    with monkeypatch.context() as outage:
        outage.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        outage.setenv("AWS_MAX_ATTEMPTS", "1")
        S3FileSystem.clear_instance_cache()  # a client keeps the address that it was made with
        saver.save(2, model, optimizer, {"step": 2})
        saver.wait()
    S3FileSystem.clear_instance_cache()
    assert [type(failure) for failure in saver.failures] == [StorageError]
    assert saver.last_saved == newest_checkpoint(directory) == f"{directory}/step_1"
    saver.save(3, model, optimizer, {"step": 3})
    saver.close()
    assert newest_checkpoint(directory) == f"{directory}/step_3"


@pytest.mark.parametrize("source", ["", "/*.txt", "/b.jsonl"])
def test_documents_are_read_from_the_object_store(s3: str, tmp_path: Path, source: str) -> None:
    folder = tmp_path / "documents"
    for number in range(30):
        storage.write_bytes(str(folder / f"a{number}.txt"), (f"Document {number}. " + TEXT * 5).encode())
    lines = [json.dumps({"id": f"l{number}", "text": f"Line {number}. {TEXT * 3}"}) for number in range(40)]
    storage.write_bytes(str(folder / "b.jsonl"), "\n".join(lines).encode())
    for name in storage.list_names(str(folder)):
        storage.write_bytes(f"{s3}/documents/{name}", storage.read_bytes(str(folder / name)))

    def data(where: str, target: str) -> TokenDataset:
        config = DataConfig(source=where + source, sequence_length=16, heldout_fraction=0.2)
        prepare(config, vocab_size=600, directory=str(tmp_path / target))
        return TokenDataset(str(tmp_path / target))

    remote, local = data(f"{s3}/documents", "remote"), data(str(folder), "local")
    assert remote.manifest.digest == local.manifest.digest
    assert remote.manifest.documents == {"": 70, "/*.txt": 30, "/b.jsonl": 40}[source]
    for index in Sampler(len(remote), 0, 8).indices(0):
        assert (remote.sequence(int(index))[0] == local.sequence(int(index))[0]).all()


def test_weights_are_written_to_and_loaded_from_the_object_store(s3: str) -> None:
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )
    model = DeepseekV3(config)
    model.init_weights(0)
    uri = f"{s3}/export"
    tensors = (pair for name, value in model.state_dict().items() for pair in state_to_hf(name, value, config))
    save_pretrained(tensors, uri, config, dtype=torch.float32, max_shard_bytes=20_000)
    assert storage.is_committed(uri)
    assert sum(name.endswith(".safetensors") for name in storage.list_names(uri)) > 1
    loaded = load_pretrained(uri, dtype=torch.float32)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
