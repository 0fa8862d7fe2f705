"""One shard: its record, batches that are closed after use, and the same tensors from an object store."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from base import storage
from base.errors import WeightsError
from model.model_config import ModelConfig
from model.numerics.formats import FORMATS
from model.numerics.fp8_blocks import quantize_blocks
from model.quantization import shard
from model.quantization.plan import plan_groups
from model.quantization.shard import quantize_groups, quantize_shard
from model.weights.reader import WeightsReader
from model.weights.safetensors_file import write_file

FORMAT = FORMATS["int8"].load(ModelConfig(preset="tiny"))


def copied(folder: str, target: str) -> str:
    for name in storage.list_names(folder):
        storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(folder, name)))
    return target


def test_the_record_describes_the_file(bf16_folder: str, tmp_path: Path) -> None:
    reader, read = WeightsReader(bf16_folder), list[int]()
    file = reader.files[3]
    groups = plan_groups(reader, FORMAT)[file]
    record = quantize_shard(reader, str(tmp_path), FORMAT, file, groups, read.append)
    data = (tmp_path / file).read_bytes()
    assert (record["bytes"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert sum(read) == record["bytes_before"]
    kept, quantized = record["kept"], record["tensors"]
    assert {row["name"] for row in kept + quantized} == set(reader.names_in(file))
    after = sum(row["bytes"] for row in kept) + sum(row["bytes_after"] for row in quantized)
    assert after == record["bytes_after"]


def test_a_file_in_which_no_group_begins_is_not_written(bf16_folder: str, tmp_path: Path) -> None:
    reader = WeightsReader(bf16_folder)
    record = quantize_shard(reader, str(tmp_path), FORMAT, reader.files[0], [])
    assert (record["bytes"], record["sha256"], record["names"]) == (0, None, [])
    assert list(tmp_path.glob("*.safetensors")) == []


@pytest.mark.parametrize("batch_bytes", [1, 5_000, 1 << 30])
def test_an_object_store_gives_the_same_tensors_in_batches_of_any_size(
    batch_bytes: int, bf16_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "_BATCH_BYTES", batch_bytes)
    local, remote = WeightsReader(bf16_folder), WeightsReader(copied(bf16_folder, f"memory://shard-{batch_bytes}"))
    groups = [names for file in plan_groups(local, FORMAT).values() for names in file]
    expected, rows = quantize_groups(local, FORMAT, groups)
    found, found_rows = quantize_groups(remote, FORMAT, groups)
    assert found_rows == rows
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_local_files_are_closed_after_each_batch(bf16_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "_BATCH_BYTES", 1)
    reader, opened = WeightsReader(bf16_folder), list[Any]()
    names = reader.names_in(reader.files[1])
    quantize_groups(
        reader, FORMAT, [[name] for name in names], on_read=lambda _: opened.append(reader.file_of(names[0]))
    )
    assert len({id(file) for file in opened}) == len(names)


def test_fp8_of_an_object_store_is_dequantized_and_needs_its_scales(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    values, scale = quantize_blocks(torch.randn(200, 130))
    uri = "memory://shard-fp8"
    for held in ({name: values, name + "_scale_inv": scale}, {name: values, name + "_scale_inv": scale[:1]}):
        write_file(storage.join(uri, "model.safetensors"), held)
        write_file(str(tmp_path / "model.safetensors"), held)
        remote, local = WeightsReader(uri), WeightsReader(str(tmp_path))
        if held[name + "_scale_inv"] is scale:
            found, expected = (quantize_groups(reader, FORMAT, [[name]])[0] for reader in (remote, local))
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        else:
            with pytest.raises(WeightsError, match=r"_scale_inv of shape \[2, 2\]"):
                quantize_groups(remote, FORMAT, [[name]])
