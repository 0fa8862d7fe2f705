"""What a person sees who gives `cherry run` something wrong: a clear text, an exit code, and nothing half written."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

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


@pytest.mark.parametrize(
    ("overrides", "code", "text"),
    [
        (["launch.nnodes=2", "launch.master_port=29500"], 11, "`cherry plan CONFIG --cluster FILE`"),
        (["cluster=no-such-cluster.yaml"], 12, "no-such-cluster.yaml"),
        (["cluster=h100.yaml"], 11, "names no provider"),
        (["cluster=nowhere.yaml"], 11, "needs provider 'nowhere', which is not installed"),
        (["data.source=no-such-folder"], 12, "data.source no-such-folder: no file there"),
        (["data.tokenizer=no-such-file.json"], 12, "data.tokenizer no-such-file.json: nothing is there"),
        (["init_from=no-such-folder"], 12, "init_from no-such-folder: nothing is there"),
    ],
)
def test_a_run_that_can_never_succeed_here_leaves_nothing(tmp_path, overrides, code, text):
    (tmp_path / "h100.yaml").write_text("kind: nodes\ngpu: H100\nnodes: 4\n")
    (tmp_path / "nowhere.yaml").write_text("kind: nodes\nprovider: nowhere\ngpu: H100\n")
    ended = cherry("run", TINY, *overrides, home=tmp_path)
    assert ended.returncode == code, ended.stderr
    assert text in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_a_port_in_use_is_told_before_a_release_or_a_demo_begins(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = cherry("deploy", TINY, f"serve.port={port}", home=tmp_path)
    assert ended.returncode == 33, ended.stderr
    assert f"error: serve.port: port {port} on 127.0.0.1 is in use" in ended.stderr
    assert "--port" not in ended.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_release_of_a_run_that_does_not_exist_leaves_no_run(tmp_path):
    ended = cherry("deploy", TINY, "name=nosuch", "serve.port=0", home=tmp_path)
    assert ended.returncode == 12, ended.stderr
    assert "cherry-tiny has no version with the alias 'candidate'" in ended.stderr
    assert not (tmp_path / "runs" / "nosuch").exists()
    assert not (tmp_path / "runs" / "serving").exists()
    assert mlflow_runs(tmp_path) == []


def mlflow_runs(home: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{home}/runs/mlflow.db")
    return list(client.search_runs([one.experiment_id for one in client.search_experiments()]))


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
    recorded = {run.info.run_name: run for run in mlflow_runs(tmp_path)}
    assert {name: run.info.status for name, run in recorded.items()} == {
        "broken": "FAILED",
        "broken-provision": "FINISHED",
        "broken-data": "FAILED",
    }
    for name in ("broken", "broken-data"):
        assert f"{source} line 2: not valid JSON" in recorded[name].data.tags["mlflow.note.content"]
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
    ended = cherry(command, TINY, "name=early", "serve.port=0", home=tmp_path, **variables)
    assert ended.returncode == 30, ended.stderr
    assert ended.stderr.startswith(f"error: {text}")
    assert "PREFECT_API_URL" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stdout + ended.stderr
    assert not (tmp_path / "runs").exists()
    if "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE" in variables:
        assert not (tmp_path / "prefect" / "prefect.db").exists()
