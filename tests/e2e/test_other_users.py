"""A run as containers start it: a uid without a name, without a home that can be written, beside others' files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.stranger import UID, run_as_stranger

pytestmark = pytest.mark.slow
_CONFIG = """\
name: mine
model: {preset: tiny, vocab_size: 512, hidden_size: 32, intermediate_size: 64, moe_intermediate_size: 32,
        num_hidden_layers: 2, num_attention_heads: 2, n_routed_experts: 4, q_lora_rank: 16, kv_lora_rank: 16,
        qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}
data: {source: corpus, sequence_length: 32, heldout_fraction: 0.3}
train: {steps: 6, batch_size: 4, warmup_steps: 2}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The stranger's folder: a config, documents, and a directory for temporary files."""
    (tmp_path / "mini.yaml").write_text(_CONFIG)
    for name in ("corpus", "tmp"):
        (tmp_path / name).mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"page {number} has words of its own, {number * 7}\n" * 12)
    for path in (tmp_path, tmp_path / "tmp"):
        os.chown(path, UID, UID)
    return tmp_path


def cherry(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a `cherry` command of the stranger's; no place that is usual can be written."""
    (folder / "home").mkdir(mode=0o555, exist_ok=True)
    places = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    places |= {f"XDG_{name}": "/proc/none" for name in ("CACHE_HOME", "CONFIG_HOME", "DATA_HOME", "RUNTIME_DIR")}
    ended = run_as_stranger([sys.executable, "-m", "flows.cli", *arguments], folder=folder, **places)
    return ended.returncode, ended.stdout, ended.stderr


def test_a_whole_run_of_a_uid_without_a_name_is_recorded_under_its_number(folder: Path) -> None:
    code, output, errors = cherry(folder, "run", "mini.yaml")
    assert code == 0, output + errors
    assert errors == ""
    assert "uid not found" not in output
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("cherry")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    steps = ("provision", "data", "train", "export", "quantize", "evaluate", "register")
    assert {run.info.run_name for run in runs} == {"mine", *(f"mine-{step}" for step in steps)}
    assert len(runs) == 8
    assert {(run.data.tags["mlflow.user"], run.info.status) for run in runs} == {(str(UID), "FINISHED")}
    assert json.loads((folder / "runs" / "mine" / "summary.json").read_text())["run_id"]
    assert not list((folder / "home").iterdir())


@pytest.mark.parametrize("place", ["runs", "runs/mine", "runs/_store"])
def test_a_place_of_somebody_else_ends_a_run_before_anything_is_written(folder: Path, place: str) -> None:
    (folder / place).mkdir(parents=True)
    if place != "runs":
        os.chown(folder / "runs", UID, UID)
    before = sorted(folder.rglob("*"))
    code, output, errors = cherry(folder, "run", "mini.yaml")
    assert code == 31, output + errors
    assert f"{folder / place} cannot be written: it is root's, and this process is uid {UID}'s. " in errors
    assert errors.count("\n") == 1
    made = {path for path in folder.rglob("*") if path not in before}
    assert made == {folder / "home", folder / "tmp" / f"prefect-{UID}"}, (
        "only Prefect's home, which every command makes"
    )
