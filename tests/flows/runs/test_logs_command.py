"""`cherry logs`: last lines of each step, new ones as they come, and what is said where there are none."""

import threading

import psutil
import pytest

from base.errors import ConfigError, MissingFileError
from base.json_lines import append_line, older_part
from flows.runs.logs_command import show_logs
from tasks.records.events import log_file


def show(directory, **options):
    lines: list[str] = []
    show_logs(directory, **{"step": None, "lines": 2, "follow": False, "write": lines.append, **options})
    return lines


@pytest.fixture
def run(make_run):
    made = make_run("tiny")
    for step, count in (("data", 3), ("train", 5)):
        for number in range(count):
            append_line(log_file(made.directory, step), f"{step} line {number}")
    return made


def test_the_last_lines_of_every_step_stand_under_its_name_in_the_order_of_the_run(run):
    expected = ["==> data <==", "data line 1", "data line 2", "==> train <==", "train line 3", "train line 4"]
    assert show(run.directory) == expected
    assert show(run.directory, step="train", lines=3) == [f"train line {number}" for number in (2, 3, 4)]


def test_a_log_that_was_begun_anew_is_read_with_the_part_before(run):
    log = log_file(run.directory, "train")
    append_line(log, "a new part", most_bytes=10)
    assert older_part(log).exists()
    assert show(run.directory, step="train") == ["train line 4", "a new part"]


def test_a_log_that_is_not_there_is_named(run, make_run):
    with pytest.raises(MissingFileError, match="no log of deploy yet; there are logs of data, train"):
        show(run.directory, step="deploy")
    with pytest.raises(MissingFileError, match="no logs yet"):
        show(make_run("fresh").directory)


def test_following_shows_new_lines_until_nobody_works_on_the_run(run):
    run.hold(psutil.Process())
    lines: list[str] = []
    seen_first, seen_new = threading.Event(), threading.Event()

    def write(line):
        lines.append(line)
        seen_first.set()
        if line == "a new line":
            seen_new.set()

    options = {"step": None, "lines": 1, "follow": True, "write": write}
    follower = threading.Thread(target=show_logs, args=(run.directory,), kwargs=options)
    follower.start()
    assert seen_first.wait(60)
    append_line(log_file(run.directory, "export"), "a new line")
    assert seen_new.wait(60)
    (run.directory / "lease.json").unlink()
    follower.join(60)
    assert not follower.is_alive()
    assert lines[-2:] == ["==> export <==", "a new line"]


def test_the_log_of_a_rank_is_shown_and_one_that_is_not_there_names_those_that_are(run):
    for rank in (0, 1, 2, 5):
        append_line(run.directory / "train" / f"rank-{rank}.log", f"rank {rank} line")
    assert show(run.directory, rank=2) == ["rank 2 line"]
    with pytest.raises(MissingFileError, match="no log of rank 7; there are logs of the ranks 0 to 2, 5"):
        show(run.directory, rank=7, follow=True)
    with pytest.raises(ConfigError, match="--rank is of the step train"):
        show(run.directory, rank=2, step="data")


def test_a_rank_before_training_is_an_error(make_run):
    with pytest.raises(MissingFileError, match="no log of rank 0; its training has not begun"):
        show(make_run("fresh").directory, rank=0)
