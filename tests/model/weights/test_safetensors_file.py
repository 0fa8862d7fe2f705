"""Written files: read back by the reference library, whatever the memory layout, and whole or not at all."""

from __future__ import annotations

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
