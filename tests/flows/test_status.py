"""`cherry status` from real run directories and a real process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from base import storage
from cherry.train_record import TrainRecord
from flows.status import last_metrics, read_runs

ORDER = ["data", "train", "export"]


def make_run(runs: Path, name: str, *, modified: int = 1_700_000_000) -> Path:
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
    directory = make_run(tmp_path, "tiny")
    finish(directory, "train", 12.5)
    finish(directory, "data", 3.0)
    finish(directory, "another", 1.0)
    lines = [{"step": step, "steps": 300, "loss": 9.0 / step, "seconds_left": 300.0 - step} for step in (1, 2, 3)]
    (directory / "train" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = read_runs(tmp_path, ORDER)
    assert list(run.finished.items()) == [("data", 3.0), ("train", 12.5), ("another", 1.0)]
    assert (run.name, run.step, run.steps_total, run.loss, run.seconds_left) == ("tiny", 3, 300, 3.0, 297.0)
    assert (run.checkpoint, run.processes) == (None, 0)


def test_only_a_committed_checkpoint_counts_and_the_highest_step_is_newest(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "tiny")
    for name in ("step_100", "step_999900", "step_1000000"):
        storage.commit(str(directory / "train" / "checkpoints" / name))
    (directory / "train" / "checkpoints" / "step_1000100").mkdir()
    (run,) = read_runs(tmp_path, ORDER)
    assert run.checkpoint == "step_1000000"


def test_runs_come_newest_first_and_other_directories_are_none(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "older", "oldest"]):
        make_run(tmp_path, name, modified=1_700_000_000 - age)
    (tmp_path / "mlartifacts").mkdir()
    (tmp_path / "mlflow.db").write_bytes(b"")
    assert [run.name for run in read_runs(tmp_path, ORDER)] == ["newest", "older", "oldest"]
    assert read_runs(tmp_path / "none", ORDER) == []


def record_process(directory: Path, name: str, process: psutil.Process, **details: object) -> None:
    storage.write_json(str(directory / name), {"pid": process.pid, "created": process.create_time(), **details})


def test_the_holder_of_a_run_its_program_and_what_they_started_are_counted_and_no_reader(tmp_path: Path) -> None:
    directory, other = make_run(tmp_path, "tiny"), make_run(tmp_path, "tiny-2")
    reader = [sys.executable, "-c", "input()"]
    launcher = [sys.executable, "-c", f"import subprocess; subprocess.run({reader!r}, stdin=0)"]

    def counts() -> dict[str, int]:
        return {run.name: run.processes for run in read_runs(tmp_path, ORDER)}

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
    make_run(tmp_path, "empty")
    damaged = make_run(tmp_path, "damaged")
    (damaged / "steps" / "data.json").write_text('{"seconds": ')
    (damaged / "steps" / "train.json").write_text("[]")
    (damaged / "train" / "metrics.jsonl").write_text("not json\n")
    finish(damaged, "export", 2.0)
    runs = {run.name: run for run in read_runs(tmp_path, ORDER)}
    assert runs["empty"].finished == {}
    assert runs["damaged"].finished == {"export": 2.0}
    assert runs["damaged"].step is None


def test_a_line_that_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    stream = tmp_path / "metrics.jsonl"
    assert last_metrics(stream) is None
    stream.write_text("")
    assert last_metrics(stream) is None
    stream.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')
    assert last_metrics(stream) == TrainRecord(step=1, loss=2.0)
    with stream.open("a") as handle:
        handle.write('\n{"note": "no step"}\n')
    assert last_metrics(stream) == TrainRecord(step=2, loss=1.0)


@pytest.mark.parametrize(("layers", "experts", "lines"), [(10, 64, 300), (59, 256, 3)])
def test_the_last_line_is_found_however_long_the_stream_or_the_line(
    tmp_path: Path, layers: int, experts: int, lines: int
) -> None:
    stream = tmp_path / "metrics.jsonl"
    load = [[1 / experts] * experts] * layers  # the second is as long as that of the largest model: 190 kB
    stream.write_text("".join(json.dumps({"step": step, "expert_load": load}) + "\n" for step in range(lines)))
    found = last_metrics(stream)
    assert found is not None
    assert found.step == lines - 1
