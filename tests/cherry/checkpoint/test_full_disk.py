"""A disk that becomes full under a run: training goes on, and its end says whose fault it was."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from base.errors import DiskFullError
from base.json_lines import append_line
from cherry.metrics import MetricsWriter
from cherry.train_record import TrainRecord
from tasks.processes.process import run_module
from tasks.records.events import write_event

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)  # a failed test may hold a file open


def fill(disk: Path) -> Path:
    """Write until nothing is taken; the file to remove."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as handle:
        for size in (4096, 1):
            try:
                while handle.write(b"x" * size):
                    pass
            except OSError:
                continue
    return filler


@contextmanager
def full(disk: Path) -> Iterator[None]:
    filler = fill(disk)
    yield
    filler.unlink()


def test_metrics_wait_for_room_and_no_line_is_cut_or_lost(disk, caplog):
    writer = MetricsWriter(disk / "metrics.jsonl", resume_step=0)
    writer.write(TrainRecord(step=1, loss=1.0))
    assert writer.new_failure() is None
    with full(disk):
        for step in range(2, 402):
            writer.write(TrainRecord(step=step, loss=1.0))
        failure = writer.new_failure()
        assert isinstance(failure, DiskFullError)
        writer.write(TrainRecord(step=402, loss=1.0))
        assert writer.new_failure() is None, "it is told once"
    writer.write(TrainRecord(step=403, loss=1.0))
    lines = (disk / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 404))
    with full(disk):
        for step in range(404, 804):
            writer.write(TrainRecord(step=step, loss=1.0))
        assert isinstance(writer.new_failure(), DiskFullError), "the next time is told again"
        writer.close()
    assert "metrics lines are lost" in caplog.text


def test_what_a_step_tells_is_dropped_and_its_program_goes_on(disk, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "talkative.py").write_text("for number in range(500): print('line', number)\n")
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        write_event(disk, "train", "progress", line=line)
        append_line(disk / "log", line)

    write_event(disk, "train", "started")
    with full(disk):
        run_module("talkative", [], on_line=on_line)
    assert len(lines) == 500
    write_event(disk, "train", "finished")
    events = [json.loads(line) for line in (disk / "events.jsonl").read_text().splitlines()]
    assert (events[0]["event"], events[-1]["event"]) == ("started", "finished")
    assert len(events) < 500


def followed(job, disk: Path, *flags: str, free: bool) -> tuple[int, str]:
    """Run a job whose disk is full from its first step on, until it tells so if `free`; its code and output."""
    output, filler = [], None
    with job.start(*flags) as process:
        for line in process.stdout:
            output.append(line)
            if line.startswith("step 1/"):
                filler = fill(disk)
            if free and filler is not None and "metrics wait" in line:
                filler.unlink()
    return process.returncode, "".join(output)


@pytest.mark.slow
def test_a_run_whose_disk_was_full_for_a_while_has_every_line(disk, tmp_path, make_job):
    job = make_job(str(disk / "run"))
    elsewhere = f"checkpoint.directory={tmp_path}/checkpoints"
    code, output = followed(job, disk, "--steps=100", "--set", elsewhere, free=True)
    assert code == 0, output
    assert output.count("metrics wait in memory, training continues: no space left") == 1
    assert [line["step"] for line in job.metrics] == list(range(1, 101))


@pytest.mark.slow
def test_a_run_whose_disk_stays_full_ends_with_the_code_for_it_and_no_traceback(disk, make_job):
    job = make_job(str(disk / "run"))
    code, output = followed(job, disk, "--steps=100", "--set", "checkpoint.every_steps=100", free=False)
    assert code == DiskFullError.exit_code, output
    assert "step 100/100" in output
    assert "error: no space left while writing" in output
    for word in ("Traceback", "Logging error", "Exception ignored"):
        assert word not in output
