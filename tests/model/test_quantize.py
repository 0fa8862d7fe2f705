"""The program: its flags, its summary, refusals, kills at every stage, and a full disk; each goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from base import storage
from base.errors import INTERRUPTED, ConfigError, DiskFullError, MissingFileError, WorkerLostError, run_program
from model.model_config import PRESETS, ModelConfig
from model.quantize import main, quantize_folder
from model.weights.hf_config import hf_config
from model.weights.safetensors_file import write_file

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(source: Path | str, target: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "model.quantize", "--source", str(source), "--target", str(target)]
    return [*words, *options]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_as_a_program(bf16_folder: str, tmp_path: Path) -> None:
    target = tmp_path / "quantized"
    words = command(bf16_folder, target)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "100% quantized 14/14 shards" in done.stdout
    error = r"relative error 0\.\d+%, 0\.0000% clipped"
    assert re.search(rf"routed expert: \d+ tensors, [\d,]+ -> [\d,]+ bytes, {error}", done.stdout)
    assert re.search(r"largest: model\.layers\.\d", done.stdout)
    assert storage.is_committed(str(target))


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--format", "int3"], ConfigError.exit_code, r"must be one of .*\(got 'int3'\)"),
        (["--workers", "0"], ConfigError.exit_code, r"--workers: must be at least 1 \(got 0\)"),
        (["--source", "/nowhere"], MissingFileError.exit_code, "/nowhere"),
    ],
)
def test_refusals(
    bf16_folder: str,
    tmp_path: Path,
    options: list[str],
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", command(bf16_folder, tmp_path / "quantized", *options)[2:])
    assert run_program(main) == code
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert re.search(text, printed)
    assert not (tmp_path / "quantized").exists()


SHARDS = 6


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of 16 MiB, each long enough in work to be interrupted."""
    folder = tmp_path_factory.mktemp("large")
    config, index = ModelConfig(**PRESETS["tiny"]), {}
    generator = torch.Generator().manual_seed(0)
    for number in range(SHARDS):
        file = f"model-{number:05}.safetensors"
        names = [f"model.layers.{number}.mlp.experts.{expert}.up_proj.weight" for expert in range(4)]
        weights = {name: torch.randn(1024, 2048, generator=generator).bfloat16() for name in names}
        write_file(str(folder / file), {**weights, f"model.layers.{number}.input_layernorm.weight": torch.ones(7)})
        index |= dict.fromkeys([*weights, f"model.layers.{number}.input_layernorm.weight"], file)
    storage.write_json(str(folder / "model.safetensors.index.json"), {"weight_map": index})
    storage.write_json(str(folder / "config.json"), hf_config(config, dtype=torch.bfloat16))
    return folder


@pytest.fixture(scope="module")
def unbroken(large_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Content of the target of a run that nothing interrupted."""
    target = tmp_path_factory.mktemp("unbroken") / "quantized"
    quantize_folder(str(large_folder), str(target))
    return contents(target)


def started_until(shards: int, words: list[str], condition: Callable[[], bool] = lambda: True) -> subprocess.Popen[str]:
    """A program that was started, finished this many shards more, and still runs when the condition holds."""
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, start_new_session=True
    )
    assert process.stdout is not None
    printed = []
    while sum("quantized" in line for line in printed) < shards:
        printed.append(process.stdout.readline())
        assert printed[-1], printed
    while not condition():
        assert process.poll() is None
    return process


def noted(target: Path) -> list[Path]:
    """Records of finished shards."""
    return list(target.glob("manifest/*.safetensors.json"))


def check_noted(target: Path) -> None:
    """Every shard that is noted as finished is whole, and nothing counts as the finished target."""
    assert not storage.is_committed(str(target))
    for path in noted(target):
        record = json.loads(path.read_text())
        assert hashlib.sha256((target / record["file"]).read_bytes()).hexdigest() == record["sha256"]


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    large_folder: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "quantized"
    # In the first shards, while one is written, and between two.
    for condition in (lambda: any(target.glob("*.tmp")), lambda: len(noted(target)) >= 3):
        process = started_until(1, command(large_folder, target), condition)
        process.kill()
        process.communicate()
        check_noted(target)
    kept = {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    finished, lines = len(noted(target)), list[str]()
    assert 3 <= finished < SHARDS
    quantize_folder(str(large_folder), str(target), lambda line, _: lines.append(line))
    assert lines[0].startswith(f"resumed: {finished} of {SHARDS} shards are there")
    same = [path for path, changed in kept.items() if path.stat().st_mtime_ns == changed]
    assert len(same) >= finished
    assert contents(target) == unbroken


@pytest.mark.slow
def test_the_end_of_the_program_or_of_a_worker_costs_the_shards_in_work(
    large_folder: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "quantized"
    process = started_until(1, command(large_folder, target, "--workers", "1"))
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()  # to the end of the workers' output too
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    check_noted(target)

    words = command(large_folder, target, "--workers", "2")
    process = started_until(1, words)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate()[0]
    assert process.returncode == INTERRUPTED, printed
    assert "Traceback" not in printed
    assert not any(worker.is_running() for worker in workers)
    assert not any(target.glob("*.tmp"))
    check_noted(target)

    process = started_until(1, words)
    psutil.Process(process.pid).children()[0].kill()
    printed = process.communicate()[0]
    assert process.returncode == WorkerLostError.exit_code, printed
    assert re.search(r"error: a worker was killed by signal 9 while it quantized model-0000\d\.safetensors", printed)
    check_noted(target)
    quantize_folder(str(large_folder), str(target))
    assert contents(target) == unbroken


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_gone_on_from(large_folder: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    target = disk / "quantized"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(disk)], check=True)
    try:
        with pytest.raises(DiskFullError, match=r"no space left while writing .*model-0000\d\.safetensors"):
            quantize_folder(str(large_folder), str(target))
        check_noted(target)
        assert noted(target)
        assert not any(target.glob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=80m", str(disk)], check=True)
        quantize_folder(str(large_folder), str(target))
        assert contents(target) == unbroken
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
