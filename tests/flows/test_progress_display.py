"""What a person reads while a flow works, from the events that the steps write."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from base import storage
from base.errors import OperationalError
from flows.progress_display import RunProgress
from tasks.records.events import write_event

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shown(tmp_path):
    """Writes events while the display follows them; what was on the screen."""

    def show(events, *, terminal=False):
        text = io.StringIO()
        console = Console(file=text, width=200, force_terminal=terminal, color_system=None, _environ={"TERM": "xterm"})
        with RunProgress(console, tmp_path / "run"):
            for step, event, details in events:
                write_event(tmp_path / "run", step, event, **details)
        return text.getvalue()

    return show


def test_each_event_is_a_line_where_there_is_no_terminal(shown):
    events = [
        ("data", "started", {}),
        ("data", "progress", {"line": "60 documents", "fraction": 0.5}),
        ("data", "finished", {"seconds": 1.25}),
        ("export", "reused", {"seconds": 9.0}),
        ("quantize", "failed", {"line": "no space left\n  more of it"}),
    ]
    assert shown(events).splitlines() == [
        "data: started",
        "data: 60 documents",
        "data: finished (1.2 s)",
        "export: found finished",
        "quantize: failed: no space left",
    ]


def test_of_long_progress_the_first_the_last_and_one_in_32_are_shown(shown):
    lines = [f"step {step}/256 loss 1.0" for step in range(1, 257)]
    events = [("train", "progress", {"line": line, "fraction": step / 256}) for step, line in enumerate(lines, 1)]
    assert shown(events).splitlines() == [f"train: {lines[step - 1]}" for step in (*range(1, 256, 8), 256)]


def test_a_line_at_least_every_30_s_of_a_step_that_takes_hours(shown):
    seconds = range(0, 91, 6)
    events = [("train", "progress", {"line": f"at {at} s", "fraction": at / 1e6, "time": 5e8 + at}) for at in seconds]
    assert shown(events).splitlines() == [f"train: at {at} s" for at in (0, 30, 60, 90)]


def test_a_terminal_has_a_row_a_step_with_what_became_of_it(shown):
    events = [
        ("data", "started", {}),
        ("data", "progress", {"line": "60 [odd] docu[/]ments", "fraction": 0.5}),
        ("data", "finished", {"seconds": 1.0}),
        ("train", "started", {}),
        ("train", "failed", {"line": "loss nan"}),
    ]
    last = shown(events, terminal=True).splitlines()
    assert any("✓" in line and "data" in line and "60 [odd] docu[/]ments" in line for line in last)
    assert any("✗" in line and "train" in line and "loss nan" in line for line in last)


def test_events_of_an_earlier_look_are_not_shown_again(shown):
    assert "data: started" in shown([("data", "started", {})])
    assert shown([("train", "started", {})]).splitlines() == ["train: started"]


LONG = "1 x this CPU: replicate 1, shard 1, context 1, expert 1; 1 x 16 sequences of 256 a rank; fp32, no recompute"


def screen_of(run_directory, events, *, width, height=40, color_system=None, environment=None):
    """What a terminal of this size shows at the end, line by line."""
    text = io.StringIO()
    console = Console(
        file=text,
        width=width,
        height=height,
        force_terminal=True,
        color_system=color_system,
        _environ=environment or {"TERM": "xterm"},
    )
    with RunProgress(console, run_directory):
        for step, event, details in events:
            write_event(run_directory, step, event, **details)
    return text.getvalue()


EVENTS = [
    ("provision", "progress", {"line": LONG}),
    ("provision", "finished", {"seconds": 1.0}),
    ("data", "reused", {"seconds": 9.0}),
    ("train", "started", {}),
    ("train", "progress", {"line": f"step 200/400 loss 2.0 {LONG}", "fraction": 0.5}),
]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_names_bars_and_times_stay_at_any_width_and_the_text_gives_way(tmp_path, width):
    lines = screen_of(tmp_path / "run", EVENTS, width=width).splitlines()
    rows = [line for line in lines[-4:] if "0:00:0" in line]
    assert len(rows) == 3, lines
    for row, name in zip(rows, ("✓ provision", "✓ data", "· train"), strict=True):
        assert name in row
        assert "━" * 6 in row
        assert len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", row)) <= width
    assert "found finished" in rows[1]
    assert "step 200" in rows[2]
    assert ("…" in rows[2]) == (width < 200)


def test_without_colours_the_rows_are_the_same(tmp_path):
    plain = screen_of(
        tmp_path / "run", EVENTS, width=80, color_system="auto", environment={"TERM": "xterm", "NO_COLOR": "1"}
    )
    assert "✓ provision" in plain
    assert not re.search(r"\x1b\[3\dm", plain)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path):
    shown = screen_of(tmp_path / "run", EVENTS, width=80, environment={"TERM": "dumb"})
    assert "\x1b" not in shown
    assert shown.splitlines()[:2] == [f"provision: {LONG}", "provision: finished (1.0 s)"]


def test_a_terminal_that_was_resized_is_filled_and_not_overfilled(tmp_path):
    text = io.StringIO()
    console = Console(
        file=text, width=200, height=40, force_terminal=True, color_system=None, _environ={"TERM": "xterm"}
    )
    with RunProgress(console, tmp_path / "run"):
        for step, event, details in EVENTS:
            write_event(tmp_path / "run", step, event, **details)
        console.width = 60
    rows = [line for line in text.getvalue().splitlines()[-4:] if "0:00:0" in line]
    assert all("━" * 6 in row for row in rows)
    assert all(len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", row)) <= 60 for row in rows)


def failing(run_directory, error, *, terminal=False):
    """What is shown of a training step that fails at step 312, in a flow that ends with `error`."""
    line = {"step": 312, "steps": 400, "loss": 2.0}
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=terminal, color_system=None, _environ={"TERM": "xterm"})
    with suppress(type(error)), RunProgress(console, run_directory):
        storage.write_bytes(f"{run_directory}/train/metrics.jsonl", f"{json.dumps(line)}\n".encode())
        storage.commit(f"{run_directory}/train/checkpoints/step_200")
        interrupted = not isinstance(error, Exception)
        said = "interrupted" if interrupted else "no space left\nmore"
        write_event(run_directory, "train", "failed", line=said, interrupted=interrupted)
        raise error
    return text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyboardInterrupt(), "interrupted at step 312 of 400; checkpoint 200"),
        (SystemExit(1), "interrupted at step 312 of 400; checkpoint 200"),
        (OperationalError("no space left"), "failed at step 312 of 400; checkpoint 200"),
    ],
)
def test_a_step_that_ended_says_how_far_it_came_and_leaves_the_error_to_its_printer(tmp_path, error, words, terminal):
    shown = failing(tmp_path / "run", error, terminal=terminal)
    assert words in shown
    assert "no space left" not in shown
    assert "Error" not in shown
    assert "KeyboardInterrupt" not in shown


def test_the_error_of_an_attempt_after_which_the_flow_goes_on_is_shown(shown):
    failed = ("train", "failed", {"line": "a lost node"})
    for terminal in (True, False):
        assert "failed: a lost node" in shown([failed, ("train", "started", {})], terminal=terminal)


def test_typed_keys_are_not_echoed_among_the_rows_and_the_terminal_is_as_before(tmp_path):
    program = (
        "import sys, termios\n"
        "from pathlib import Path\n"
        "from rich.console import Console\n"
        "from flows.progress_display import RunProgress\n"
        "echo = lambda: bool(termios.tcgetattr(0)[3] & termios.ECHO)\n"
        "before = echo()\n"
        "with RunProgress(Console(), Path(sys.argv[1])):\n"
        "    during = echo()\n"
        "print('echo', before, during, echo(), flush=True)\n"
    )
    main, other = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment) as started:
        os.close(other)
        seen = b""
        while b"echo " not in seen or not seen.endswith(b"\n"):
            try:
                seen += os.read(main, 4096)
            except OSError:  # its last writer is gone
                break
    os.close(main)
    assert started.returncode == 0, seen
    assert b"echo True False True" in seen
