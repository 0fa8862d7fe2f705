"""Room for a replica: what it needs by its files and its config, and a refusal that starts nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from base import storage
from base.errors import OperationalError
from tasks.overrides import resolve
from tasks.processes.replicas import Server, ServingDirectory
from tasks.release.choice import Release
from tasks.release.room import check_room, weights_bytes
from tasks.run_config import RunConfig

LAYERS, LATENT, ROPE = 3, 16, 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights of 1000 int8 values, 10 fp16 and 4 fp32 ones, in two shards."""
    path = tmp_path / "weights"
    path.mkdir()
    save_file({"a": np.zeros((10, 100), np.int8), "b": np.zeros(10, np.float16)}, path / "model-1.safetensors")
    save_file({"c": np.zeros((2, 2), np.float32)}, path / "model-2.safetensors", metadata={"format": "pt"})
    model = {"num_hidden_layers": LAYERS, "kv_lora_rank": LATENT, "qk_rope_head_dim": ROPE}
    storage.write_json(str(path / "config.json"), model)
    return path


def config(tmp_path: Path, **engine: object) -> RunConfig:
    values = {"name": "net", "runs_directory": str(tmp_path / "runs"), "serve": {"engine": {"device": "cpu", **engine}}}
    return resolve("configs/tiny.yaml", values)


@pytest.mark.parametrize(("float_bytes", "wanted"), [(4, 1000 + 40 + 16), (2, 1000 + 20 + 8)])
def test_quantized_weights_stay_so_and_floats_take_the_engines_type(
    folder: Path, float_bytes: int, wanted: int
) -> None:
    assert weights_bytes(str(folder), float_bytes) == wanted


def test_a_replica_without_room_is_refused_with_its_figures_and_nothing_is_made(folder: Path, tmp_path: Path) -> None:
    gib = psutil.virtual_memory().total / 2**30 * 2
    blocks = int(gib * 2**30 / (LAYERS * 16 * (LATENT + ROPE) * 4))
    with pytest.raises(OperationalError) as refused:
        check_room(config(tmp_path, cache_blocks=blocks), Release("net", 2, str(folder)))
    text = str(refused.value)
    assert text.startswith(f"memory: a replica of net-v2 needs at least {gib + 0.5:.1f} GiB (0.0 GiB of weights")
    assert f"{gib:.1f} GiB of cache, 0.5 GiB for the process), and " in text
    assert "GiB are free here. Free some, or lower serve.engine.cache_blocks" in text
    assert not (tmp_path / "runs").exists()
    check_room(config(tmp_path), Release("net", 2, str(folder)))


def test_what_runs_is_named_and_the_version_that_runs_already_needs_no_room(folder: Path, tmp_path: Path) -> None:
    large = config(tmp_path, cache_blocks=10**12)
    serving, own = ServingDirectory(large.runs_directory), psutil.Process(os.getpid())
    serving.path.mkdir(parents=True)
    server = Server("net-v1", own.pid, own.create_time(), "http://127.0.0.1:9", str(folder), "net-v1")
    storage.write_json(str(serving.path / "server-net-v1.json"), server.__dict__)
    with pytest.raises(OperationalError, match=r"are free here beside net-v1\. .*`cherry stop`"):
        check_room(large, Release("net", 2, str(folder)))
    check_room(large, Release("net", 1, str(folder)))


def test_weights_that_cannot_be_read_are_left_to_the_replica_to_tell(tmp_path: Path) -> None:
    check_room(config(tmp_path, cache_blocks=10**12), Release("net", 1, str(tmp_path / "none")))
