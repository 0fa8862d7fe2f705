"""What is cleaned up after a flow that was killed outright, from what it left on disk."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from base import storage
from base.errors import DataError
from tasks.interruptions.leftovers import FLOW_RUN, end_leftovers, teardown
from tasks.overrides import resolve
from tasks.processes.process import is_alive
from tasks.steps import PROGRAM

OVERRIDES = {"name": "left", "tracking": {"uri": "http://127.0.0.1:9"}}


@pytest.fixture
def left(tmp_path, monkeypatch):
    """A run directory of a process that is gone, and a program of it that still runs."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = resolve("configs/tiny.yaml", {**OVERRIDES, "runs_directory": str(tmp_path)})
    program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    created = psutil.Process(gone.pid).create_time()
    gone.wait()
    directory = tmp_path / "left"
    lease = {"pid": gone.pid, "created": created}
    storage.write_json(str(directory / "lease.json"), lease)
    storage.write_json(str(directory / FLOW_RUN), {"run_id": "0" * 32})
    record = {"pid": program.pid, "created": psutil.Process(program.pid).create_time()}
    storage.write_json(str(directory / PROGRAM), record)
    yield SimpleNamespace(directory=directory, program=program, lease=lease, config=config)
    program.communicate()


def hook(left):
    """As Prefect calls it: with the parameters that the API keeps."""
    overrides = {**OVERRIDES, "runs_directory": left.config.runs_directory}
    flow_run = SimpleNamespace(parameters={"config": "configs/tiny.yaml", "overrides": overrides})
    teardown(None, flow_run, None)


def test_the_program_of_a_dead_flow_is_ended(left):
    record = storage.read_json(str(left.directory / PROGRAM))
    assert is_alive(**record)
    hook(left)
    assert not is_alive(**record)
    assert not (left.directory / "lease.json").exists()
    assert not (left.directory / PROGRAM).exists()
    hook(left)  # nothing is left, and nothing is done


def test_a_hook_takes_the_resolved_config_that_the_command_line_started_a_flow_with(left):
    parameters = json.loads(json.dumps({"config": left.config.model_dump(mode="json"), "overrides": {}}))
    teardown(None, SimpleNamespace(parameters=parameters), None)
    assert not (left.directory / PROGRAM).exists()


def test_a_live_flow_is_left_alone(left):
    storage.write_json(
        str(left.directory / "lease.json"),
        {**left.lease, "pid": os.getpid(), "created": psutil.Process().create_time()},
    )
    hook(left)
    assert left.program.poll() is None
    assert (left.directory / PROGRAM).exists()


def test_a_pid_that_is_another_process_now_is_left_alone(left):
    record = storage.read_json(str(left.directory / PROGRAM))
    storage.write_json(str(left.directory / PROGRAM), {**record, "created": record["created"] - 50.0})
    hook(left)
    assert left.program.poll() is None


def test_a_hook_with_a_config_that_is_gone_says_so(caplog):
    teardown(None, SimpleNamespace(parameters={"config": "gone.yaml"}), None)
    assert "nothing to tear down" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"pid": -1, "created": 1.0}',
        '{"pid": 1e12, "created": 1.0}',
        '{"pid": 1',
        "null",
    ],
)
def test_a_damaged_record_of_a_program_is_refused_by_name_and_nothing_is_given_back(left, content):
    (left.directory / PROGRAM).write_text(content)
    with pytest.raises(DataError, match=r"program\.json: it is damaged, .* remove it"):
        end_leftovers(left.config)
    assert (left.directory / "lease.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run_id": 1}', "null"])
def test_a_damaged_record_of_the_tracked_run_keeps_nothing_from_being_cleaned_up(left, content):
    (left.directory / FLOW_RUN).write_text(content)
    hook(left)
    left.program.wait()
    assert not (left.directory / "lease.json").exists()
