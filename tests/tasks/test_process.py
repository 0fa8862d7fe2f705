"""Programs that tasks start: their lines and errors arrive, and nothing of them stays behind."""

import os
import sys
import threading
import time

import psutil
import pytest

from base.errors import CherryError, ConfigError, DataError, OperationalError, WorkerLostError
from tasks.process import in_background, is_alive, run_module

_DEADLINE_S = 30.0


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes a module that `run_module` can start; its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(body: str) -> str:
        (tmp_path / "program_under_test.py").write_text(body)
        return "program_under_test"

    return write


def test_lines_arrive_in_order_and_in_the_log(program, tmp_path):
    lines: list[str] = []
    name = program("import sys\nfor i in range(3): print(i, *sys.argv[1:])\n")
    run_module(name, ["a b"], on_line=lines.append, log_file=tmp_path / "log")
    assert lines == ["0 a b", "1 a b", "2 a b"]
    assert (tmp_path / "log").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (11, ConfigError),
        (13, DataError),
        (34, WorkerLostError),
        (48, OperationalError),
        (143, OperationalError),
        (1, CherryError),
        (2, CherryError),
        (77, CherryError),
    ],
)
def test_an_exit_code_is_the_error_that_the_program_meant(program, code, kind):
    name = program(f"import sys\nprint('error: two things:\\n  one\\n  two', file=sys.stderr)\nsys.exit({code})\n")
    with pytest.raises(kind) as caught:
        run_module(name, [], on_line=lambda _: None)
    assert type(caught.value) is kind
    assert str(caught.value) == "two things:\n  one\n  two"
    assert caught.value.exit_code == code


def test_a_signal_is_a_lost_worker(program):
    name = program("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(WorkerLostError, match="killed by"):
        run_module(name, [], on_line=lambda _: None)


def test_a_grandchild_in_a_session_of_its_own_ends_with_the_task(program, tmp_path):
    sleeper = "import time; time.sleep(1000)"
    name = program(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {sleeper!r}], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    found: list[psutil.Process] = []

    def stop(line: str) -> None:
        found.append(psutil.Process(int(line)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_module(name, [], on_line=stop)
    deadline = time.monotonic() + _DEADLINE_S
    while found[0].is_running() and found[0].status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the grandchild still runs"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has scheduling policies")
def test_threads_from_the_background_stay_in_it_and_programs_started_after_it_do_not(program):
    found: dict[str, int] = {}
    go_on = threading.Event()

    def follow():
        go_on.wait()
        found["thread"] = os.sched_getscheduler(0)

    thread = threading.Thread(target=follow)
    with in_background():
        thread.start()
    lines: list[str] = []
    run_module(program("import os; print(os.sched_getscheduler(0))"), [], on_line=lines.append)
    go_on.set()
    thread.join()
    assert found == {"thread": os.SCHED_BATCH}
    assert (lines, os.sched_getscheduler(0)) == ([str(os.SCHED_OTHER)], os.SCHED_OTHER)


def test_a_pid_that_was_given_to_another_process_is_not_the_holder():
    assert is_alive(os.getpid(), psutil.Process().create_time())
    assert not is_alive(os.getpid(), psutil.Process().create_time() - 100.0)
