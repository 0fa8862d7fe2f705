"""The program: calibrated by a file or by a run's data, the same as without where nothing is, and misuse."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base import storage
from base.errors import ConfigError, DataError, MissingFileError, run_program
from cherry.calibration.quantize import main
from model.quantization.calibrated import work_directory
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf
from tests.model.conftest import random_model, small_config
from tests.training_job import ROOT, environment_of_programs, prepare_documents


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def weights(prepared: Path) -> Path:
    """Folder of a random model with the tokenizer of the prepared documents."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 96, "intermediate_size": 128, "n_routed_experts": 4}
    config = small_config(vocab_size=600, num_hidden_layers=2, **sizes)
    named = (p for name, tensor in random_model(config).state_dict().items() for p in state_to_hf(name, tensor, config))
    folder = prepared.parent.parent / "weights"
    save_pretrained(named, str(folder), config, dtype=torch.bfloat16, tokenizer_uri=str(prepared / "tokenizer.json"))
    return folder


def words(source: Path, target: Path, *options: str) -> list[str]:
    return ["cherry.calibration.quantize", "--source", str(source), "--target", str(target), *options]


GPTQ = ("--format", "w4a16", "--method", "gptq")


def test_as_a_program_calibrated_by_a_run_s_data(weights: Path, prepared: Path, tmp_path: Path) -> None:
    target = tmp_path / "quantized"
    command = [sys.executable, "-m", *words(weights, target, *GPTQ, "--calibration", str(prepared))]
    options = {"capture_output": True, "text": True, "timeout": 600, "cwd": ROOT, "env": environment_of_programs()}
    ended = subprocess.run(command, check=False, **options)
    assert ended.returncode == 0, ended.stderr
    assert re.search(
        r"^ ?\d+% calibrated layer 2/3, [\d.e+-]+ MB/s, [\d.e+-]+(s|min) left$", ended.stdout, re.MULTILINE
    )
    assert "100% quantized" in ended.stdout
    assert re.search(r"calibrated by gptq with [\d,]+ tokens: an expert saw .* at least \d", ended.stdout)
    assert not work_directory(str(target)).exists()
    load_pretrained(str(target), dtype=torch.float32)
    report = storage.read_json(str(target / "quantization.json"))
    sequences = storage.read_json(str(prepared / "manifest.json"))["sequences"]
    assert report["calibration"]["documents"] == min(128, sequences)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", list(arguments))
    return run_program(main)


def test_a_file_of_text_calibrates_with_the_tokens_asked_for(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    for name in "abcd":
        (tmp_path / "set" / f"{name}.txt").write_text("alpha beta gamma delta " * 200)
    flags = (*GPTQ, "--calibration", str(tmp_path / "set"), "--calibration-tokens", "300")
    assert run(monkeypatch, *words(weights, tmp_path / "quantized", *flags)) == 0
    found = storage.read_json(str(tmp_path / "quantized" / "quantization.json"))["calibration"]
    assert (found["documents"], found["tokens"]) == (2, 2 * 256)
    assert "calibrated by gptq with 512 tokens" in capsys.readouterr().out


def test_without_a_method_it_is_the_plain_program(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *words(weights, tmp_path / "quantized", "--format", "w4a16")) == 0
    assert "calibrated" not in capsys.readouterr().out
    assert storage.read_json(str(tmp_path / "quantized" / "quantization.json"))["method"] == "nearest"


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--method", "round"], ConfigError.exit_code, r"--method: must be one of nearest, .*\(got 'round'\)"),
        (["--method", "gptq"], ConfigError.exit_code, "the format int8 has none: take the format w4a16, or the method"),
        ([*GPTQ], ConfigError.exit_code, "--method gptq needs --calibration: name a run's data directory"),
        (["--calibration", "x"], ConfigError.exit_code, r"--calibration: --method nearest needs no calibration"),
        (["--calibration-tokens", "5"], ConfigError.exit_code, r"--calibration-tokens: --method nearest needs no"),
        ([*GPTQ, "--calibration", "x", "--calibration-tokens", "0"], ConfigError.exit_code, r"at least 1 \(got 0\)"),
        ([*GPTQ, "--calibration", "/nowhere"], MissingFileError.exit_code, "/nowhere"),
        (["--format", "int3", "--method", "gptq"], ConfigError.exit_code, r"must be one of .*\(got 'int3'\)"),
        (["--workers", "0"], ConfigError.exit_code, r"--workers: must be at least 1"),
    ],
)
def test_misuse(
    weights: Path,
    tmp_path: Path,
    options: list[str],
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *words(weights, tmp_path / "quantized", *options)) == code
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert re.search(text, printed)
    assert not (tmp_path / "quantized").exists()


def test_weights_without_a_tokenizer_need_data_that_is_prepared(
    weights: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(weights, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "a.txt").write_text("alpha beta")
    flags = (*GPTQ, "--calibration")
    assert run(monkeypatch, *words(bare, tmp_path / "one", *flags, str(tmp_path / "a.txt"))) == DataError.exit_code
    assert "has no tokenizer.json" in capsys.readouterr().err
    assert run(monkeypatch, *words(bare, tmp_path / "two", *flags, str(prepared), "--calibration-tokens", "64")) == 0
