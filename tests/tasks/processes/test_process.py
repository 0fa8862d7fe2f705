"""Programs that tasks start: their lines and errors arrive, and nothing of them stays behind."""

import os
import sys
import threading
import time

import psutil
import pytest

from base.errors import CherryError, ConfigError, DataError, OperationalError, WeightsError, WorkerLostError
from tasks.processes.process import in_background, is_alive, run_command, run_module
from tests import processes

_DEADLINE_S = 30.0


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes a module that `run_module` can start; its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(body: str) -> str:
        (tmp_path / "program_under_test.py").write_text(body)
        return "program_under_test"

    return write


def test_lines_arrive_in_order(program):
    lines: list[str] = []
    name = program("import sys\nfor i in range(3): print(i, *sys.argv[1:])\n")
    run_module(name, ["a b"], on_line=lines.append)
    assert lines == ["0 a b", "1 a b", "2 a b"]


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
def test_an_exit_code_alone_tells_the_kind_of_the_error_and_the_last_lines_what_it_was(program, code, kind):
    body = "import sys\nfor i in range(50): print('line', i)\nprint('error: not this', flush=True)\n"
    name = program(f"{body}sys.exit({code})\n")
    with pytest.raises(kind) as caught:
        run_module(name, [], on_line=lambda _: None)
    assert type(caught.value) is kind
    assert str(caught.value).splitlines()[-2:] == ["line 49", "error: not this"]
    assert f"{name} ended with exit code {code}" in str(caught.value)
    assert caught.value.exit_code == code


def test_a_program_whose_time_is_over_gets_sigterm_and_one_that_ends_before_does_not(program):
    name = program("print('here', flush=True)\nwhile True: input()\n")
    with pytest.raises(WorkerLostError, match="killed by signal 15"):
        run_command(_command(name), name=name, on_line=lambda _: None, until=time.time() - 1.0)
    run_command(_command(program("print('done')")), name=name, on_line=lambda _: None, until=time.time() + 3600.0)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def _command(module: str) -> list[str]:
    return [sys.executable, "-c", f"import {module}"]


def test_an_error_crosses_the_process_with_its_class_and_its_text(program):
    name = program(
        "from base.errors import DataError, run_program\n"
        "def main(): raise DataError('two things:\\n  one\\n  two')\n"
        "code = run_program(main)\n"
        "print('error: printed after it')\n"
        "raise SystemExit(code)\n"
    )
    with pytest.raises(DataError) as caught:
        run_module(name, [], on_line=lambda _: None)
    assert str(caught.value) == "two things:\n  one\n  two"


def test_the_error_of_a_rank_crosses_the_launcher_and_a_traceback_leaves_the_last_lines(program, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    body = (
        "import sys\n"
        "from base.errors import WeightsError\n"
        "from cherry import rank_main\n"
        "def fail(options, rank, hooks):\n"
        "    raise {}\n"
        "rank_main._train = fail\n"
        "rank_main.main([])\n"
    )
    name = program(body.format("WeightsError('shard 3 is torn\\n  really')"))
    launch = ["--nproc_per_node=1", "-m", name]
    lines: list[str] = []
    with pytest.raises(WeightsError) as caught:
        run_module("cherry.launcher", launch, on_line=lines.append)
    assert str(caught.value) == "shard 3 is torn\n  really"
    assert "error: shard 3 is torn" in lines
    program(body.format("KeyError('oops')"))
    with pytest.raises(CherryError) as caught:
        run_module("cherry.launcher", launch, on_line=lambda _: None)
    assert (type(caught.value), caught.value.exit_code) == (CherryError, 1)
    assert "KeyError: 'oops'" in str(caught.value)


def test_progress_arrives_with_its_line_and_other_lines_are_none(program):
    name = program(
        "from base.progress import print_progress\n"
        "print('begins', flush=True)\n"
        "print_progress('half [50%]', 0.5)\n"
        "print('between', flush=True)\n"
        "print_progress('all', 1.0)\n"
    )
    lines: list[str] = []
    progress: list[tuple[str, float]] = []
    run_module(name, [], on_line=lines.append, on_progress=lambda line, fraction: progress.append((line, fraction)))
    assert lines == ["begins", "between"]
    assert progress == [("half [50%]", 0.5), ("all", 1.0)]
    everything: list[str] = []
    run_module(name, [], on_line=everything.append)
    assert everything == ["begins", "half [50%]", "between", "all"]


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
    while processes.is_alive(found[0]):
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
