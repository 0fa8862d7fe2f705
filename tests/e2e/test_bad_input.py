"""What a person sees who gives `cherry run` something wrong: a clear text, an exit code, and nothing half written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs" / "tiny.yaml")


def cherry(*arguments: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PREFECT_HOME": str(home / "prefect"), "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, check=False)


def test_three_mistakes_in_a_config_are_all_told_before_anything_starts(tmp_path):
    config = tmp_path / "wrong.yaml"
    config.write_text("name: wrong\nmodel: {preset: tiny, n_group: 3, vocab_sise: 9}\ntrain: {batch_size: fifteen}\n")
    ended = cherry("run", str(config), home=tmp_path)
    assert ended.returncode == 11
    assert f"{config}: 3 problems" in ended.stderr
    assert "model.vocab_sise: unknown key, did you mean vocab_size? (got 9)" in ended.stderr
    assert "train.batch_size: input should be a valid integer (got 'fifteen')" in ended.stderr
    assert "model.n_routed_experts: must be divisible by n_group (3) (got 8)" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_a_missing_config_is_named(tmp_path):
    ended = cherry("run", "configs/tinny.yaml", home=tmp_path)
    assert ended.returncode == 12
    assert ended.stderr.startswith("error: no config file at configs/tinny.yaml")


@pytest.mark.slow
def test_a_broken_line_of_jsonl_is_named_and_leaves_no_data_behind(tmp_path):
    source = tmp_path / "documents.jsonl"
    source.write_text('{"text": "one"}\n{"text": "two"\n{"text": "three"}\n')
    ended = cherry("run", TINY, f"data.source={source}", "name=broken", home=tmp_path)
    assert ended.returncode == 13, ended.stderr
    assert f"{source} line 2: not valid JSON" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "runs" / "broken" / "data" / "COMMITTED").exists()
    assert not (tmp_path / "runs" / "broken" / "steps" / "data.json").exists()
    told = ended.stdout.replace("\n", "")
    assert f"{Path('runs/broken')}/events.jsonl" in told
    assert f"{Path('runs/broken')}/train" not in told
    assert "resume:   the same command" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "variables", "text"),
    [
        (
            "run",
            {"PREFECT_API_URL": "http://somebody:secret@127.0.0.1:9/api"},
            "Prefect's server at http://127.0.0.1:9/api does not answer",
        ),
        (
            "deploy",
            {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "0"},
            "Prefect's temporary server did not start",
        ),
        (
            "deploy",
            {"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false"},
            "Prefect's temporary server did not start (PREFECT_SERVER_ALLOW_EPHEMERAL_MODE forbids one)",
        ),
    ],
)
def test_a_prefect_server_that_does_not_answer_is_named(command, variables, text, tmp_path):
    ended = cherry(command, TINY, "name=early", home=tmp_path, **variables)
    assert ended.returncode == 30, ended.stderr
    assert ended.stderr.startswith(f"error: {text}")
    assert "PREFECT_API_URL" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stdout + ended.stderr
    assert not (tmp_path / "runs").exists()
    if "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE" in variables:
        assert not (tmp_path / "prefect" / "prefect.db").exists()
