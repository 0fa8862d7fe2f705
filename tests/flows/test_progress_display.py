"""What a person reads while a flow works, from the events that the steps write."""

import io

import pytest
from rich.console import Console

from flows.progress_display import RunProgress
from tasks.steps import write_event


@pytest.fixture
def shown(tmp_path):
    """Writes events while the display follows them; what was on the screen."""

    def show(events, *, terminal=False):
        text = io.StringIO()
        console = Console(file=text, width=200, force_terminal=terminal, color_system=None)
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
        "quantize: no space left",
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
