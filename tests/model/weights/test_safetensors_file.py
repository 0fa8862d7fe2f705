"""Written files: read back by the reference library, whatever the memory layout, and whole or not at all."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from base import storage
from base.errors import DiskFullError
from model.weights.safetensors_file import SafetensorsFile, write_file


@pytest.mark.parametrize("scheme", ["", "memory://written"])
def test_what_is_written_is_what_the_reference_reads(scheme: str, tmp_path: Path) -> None:
    fused = torch.randn(6, 4)
    tensors = {
        "gate": fused[:3],
        "up": fused[3:],
        "again": fused[3:],  # one memory under two names
        "transposed": fused.t(),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "values": torch.arange(-3, 3, dtype=torch.int8),
        "fp8": torch.ones(2, 2).to(torch.float8_e4m3fn),
    }
    uri = storage.join(scheme or str(tmp_path), "a.safetensors")
    size = write_file(uri, tensors)
    data = storage.read_bytes(uri)
    assert len(data) == size
    read, opened = safetensors.torch.load(data), SafetensorsFile(uri)
    assert set(read) == set(opened.tensors) == set(tensors)
    for name, tensor in tensors.items():
        for found in (read[name], opened.read(name)):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found.float(), tensor.float()), name


@pytest.mark.parametrize("scheme", ["", "memory://hashed"])
def test_the_bytes_are_the_library_s_and_the_digest_is_theirs(scheme: str, tmp_path: Path) -> None:
    kinds = ["f64", "f32", "f16", "bf16", "e4m3", "e5m2", "e8m0", "i64", "i32", "i16", "i8", "u8", "bool"]
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    types += [torch.float8_e8m0fnu, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {f'{kind} "é"': torch.ones(3, 5).to(dtype) for kind, dtype in zip(kinds, types, strict=True)}
    tensors["long"] = torch.arange(600_000).float()  # more than a block
    uri, hasher = storage.join(scheme or str(tmp_path), "a.safetensors"), hashlib.sha256()
    write_file(uri, tensors, hasher)
    data = storage.read_bytes(uri)
    assert data == safetensors.torch.save(tensors, metadata={"format": "pt"})
    assert hasher.hexdigest() == hashlib.sha256(data).hexdigest()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_keeps_the_file_that_was_there(small_disk: Path) -> None:
    file = small_disk / "a.safetensors"
    write_file(str(file), {"w": torch.ones(4)})
    before = file.read_bytes()
    with pytest.raises(DiskFullError, match=str(file)):
        write_file(str(file), {"w": torch.ones(1 << 20)})
    assert os.listdir(small_disk) == [file.name]
    assert file.read_bytes() == before


def test_reading_ahead_changes_nothing_and_asks_no_remote_store(tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    tensors = {"a": torch.arange(6.0).view(2, 3), "empty": torch.empty(0)}
    write_file(path, tensors)
    file = SafetensorsFile(path)
    file.read_ahead(tensors)
    assert all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items())
    write_file("memory://ahead/a.safetensors", tensors)
    remote = SafetensorsFile("memory://ahead/a.safetensors")
    storage.remove_tree("memory://ahead")
    remote.read_ahead(tensors)
