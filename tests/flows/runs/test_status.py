"""`cherry status` from real run directories and a real process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from base import storage
from flows.runs.status import read_run, read_runs, served_from
from tasks.processes.replicas import Server, ServingDirectory


def write_run(runs: Path, name: str, *, modified: int = 1_700_000_000) -> Path:
    directory = runs / name
    (directory / "steps").mkdir(parents=True)
    (directory / "train").mkdir()
    config = directory / "config.yaml"
    config.write_text(f"name: {name}\n")
    os.utime(config, (modified, modified))
    return directory


def finish(directory: Path, step: str, seconds: float) -> None:
    storage.write_json(str(directory / "steps" / f"{step}.json"), {"step": step, "seconds": seconds})


def test_a_run_says_what_it_has_finished_and_where_training_is(tmp_path: Path) -> None:
    directory = write_run(tmp_path, "tiny")
    finish(directory, "train", 12.5)
    finish(directory, "data", 3.0)
    finish(directory, "another", 1.0)
    lines = [{"step": step, "steps": 300, "loss": 9.0 / step, "seconds_left": 300.0 - step} for step in (1, 2, 3)]
    (directory / "train" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = read_runs(tmp_path)
    assert list(run.finished.items()) == [("data", 3.0), ("train", 12.5), ("another", 1.0)]
    assert (run.name, run.step, run.steps_total, run.loss, run.seconds_left) == ("tiny", 3, 300, 3.0, 297.0)
    assert (run.checkpoint, run.processes) == (None, 0)


def test_only_a_committed_checkpoint_counts_and_the_highest_step_is_newest(tmp_path: Path) -> None:
    directory = write_run(tmp_path, "tiny")
    for name in ("step_100", "step_999900", "step_1000000"):
        storage.commit(str(directory / "train" / "checkpoints" / name))
    (directory / "train" / "checkpoints" / "step_1000100").mkdir()
    (run,) = read_runs(tmp_path)
    assert run.checkpoint == "step_1000000"


def test_runs_come_newest_first_and_other_directories_are_none(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "older", "oldest"]):
        write_run(tmp_path, name, modified=1_700_000_000 - age)
    (tmp_path / "mlartifacts").mkdir()
    (tmp_path / "mlflow.db").write_bytes(b"")
    assert [run.name for run in read_runs(tmp_path)] == ["newest", "older", "oldest"]
    assert read_runs(tmp_path / "none") == []


def record_process(directory: Path, name: str, process: psutil.Process, **details: object) -> None:
    storage.write_json(str(directory / name), {"pid": process.pid, "created": process.create_time(), **details})


def test_the_holder_of_a_run_its_program_and_what_they_started_are_counted_and_no_reader(tmp_path: Path) -> None:
    directory, other = write_run(tmp_path, "tiny"), write_run(tmp_path, "tiny-2")
    reader = [sys.executable, "-c", "input()"]
    launcher = [sys.executable, "-c", f"import subprocess; subprocess.run({reader!r}, stdin=0)"]

    def counts() -> dict[str, int]:
        return {run.name: run.processes for run in read_runs(tmp_path)}

    with (
        subprocess.Popen([*reader, f"--data_dir={directory}/data"], stdin=subprocess.PIPE) as stranger,
        subprocess.Popen(launcher, stdin=subprocess.PIPE) as program,
    ):
        root = psutil.Process(program.pid)
        while not root.children():
            assert program.poll() is None
        assert counts() == {"tiny": 0, "tiny-2": 0}
        record_process(directory, "program.json", root)
        assert counts() == {"tiny": 2, "tiny-2": 0}
        record_process(directory, "lease.json", root, host=socket.gethostname(), token="t")
        assert counts()["tiny"] == 2
        record_process(other, "lease.json", root, host="elsewhere")
        assert counts()["tiny-2"] == 0
        storage.write_json(str(other / "lease.json"), {"pid": root.pid, "created": root.create_time() - 50.0})
        assert counts()["tiny-2"] == 0
        for process in (program, stranger):
            process.communicate(b"\n")
    assert counts() == {"tiny": 0, "tiny-2": 0}


def test_a_run_that_is_just_starting_or_damaged_is_still_listed(tmp_path: Path) -> None:
    write_run(tmp_path, "empty")
    damaged = write_run(tmp_path, "damaged")
    (damaged / "steps" / "data.json").write_text('{"seconds": ')
    (damaged / "steps" / "train.json").write_text("[]")
    (damaged / "train" / "metrics.jsonl").write_text("not json\n")
    finish(damaged, "export", 2.0)
    storage.commit(str(damaged / "train" / "checkpoints" / "step_2"))
    storage.write_bytes(str(damaged / "train" / "checkpoints" / "step_4" / storage.MARKER), b"")
    runs = {run.name: run for run in read_runs(tmp_path)}
    assert runs["empty"].finished == {}
    assert runs["damaged"].checkpoint == "step_2"
    assert runs["damaged"].finished == {"export": 2.0}
    assert runs["damaged"].step is None


@pytest.mark.parametrize(
    ("prepare", "state"),
    [
        (lambda run: run, "waiting"),
        (lambda run: run.finish("data"), "interrupted"),
        (lambda run: run.finish_all(), "finished"),
        (lambda run: run.finish("data").fail("train", line="loss nan"), "failed"),
        (lambda run: run.finish("data").fail("train", line="interrupted", interrupted=True), "interrupted"),
        (lambda run: run.finish_all().fail("deploy", line="port in use"), "finished"),
        (lambda run: run.finish("data").hold(psutil.Process()), "running"),
        (lambda run: run.fail("train", line="a lost node").hold(psutil.Process()), "waiting"),
        (lambda run: run.finish("data").hold(psutil.Process(), host="elsewhere"), "running"),
    ],
)
def test_a_runs_state_follows_from_its_lease_its_steps_and_its_newest_event(make_run, tmp_path, prepare, state):
    prepare(make_run("tiny"))
    (run,) = read_runs(tmp_path / "runs")
    assert run.state == state


def test_a_lease_of_another_host_counts_until_it_is_stale(make_run, tmp_path):
    made = make_run("tiny").finish("data").hold(psutil.Process(), host="elsewhere")
    os.utime(made.directory / "lease.json", (1.7e9, 1.7e9))
    assert read_run(tmp_path / "runs", "tiny").state == "interrupted"


def test_a_finished_run_has_its_verdict_its_figure_and_its_version(make_run, tmp_path):
    make_run("tiny").evaluate(verdict="worse", bits=2.25).register("small", 4)
    run = read_run(tmp_path / "runs", "tiny")
    assert (run.verdict, run.reason, run.heldout_bits_per_byte) == ("worse", "a reason", 2.25)
    assert (run.model, run.version, run.served) == ("small", 4, ())


def test_what_is_served_from_a_run_is_said_with_its_share_of_the_traffic(make_run, tmp_path):
    run, other = make_run("tiny"), make_run("tiny-2")
    serving, own = ServingDirectory(str(tmp_path / "runs")), psutil.Process()
    server = Server("small-4", own.pid, own.create_time(), "http://x", str(run.directory / "quantized"), "small v4")
    storage.write_json(str(serving.path / "server-small-4.json"), asdict(server))
    storage.write_json(str(serving.routes), {"replicas": [{"name": "small-4", "weight_percent": 25.0}]})
    runs = {run.name: run.served for run in read_runs(tmp_path / "runs")}
    assert runs == {"tiny": ("small v4 25 %",), "tiny-2": ()}
    assert served_from(run.directory) == [server]
    assert served_from(other.directory) == []
