"""A terminal's input while something is drawn: no echo, keys at once, and its settings as before afterwards."""

from __future__ import annotations

import os
import pty
import signal
import sys
import termios

import pytest

from flows.terminal import noting_interrupts, read_key, without_echo


@pytest.fixture
def typing(monkeypatch):
    """The other end of a terminal that is this process's standard input."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r", closefd=True) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        yield ours
    os.close(ours)


@pytest.mark.parametrize("key_by_key", [True, False])
def test_settings_are_as_before_afterwards(typing, key_by_key):
    before = termios.tcgetattr(sys.stdin)
    with without_echo(key_by_key=key_by_key):
        inside = termios.tcgetattr(sys.stdin)[3]
        assert not inside & termios.ECHO
        assert bool(inside & termios.ICANON) is not key_by_key
    assert termios.tcgetattr(sys.stdin) == before


def test_a_key_is_read_before_its_line_ends(typing):
    with without_echo(key_by_key=True):
        assert read_key(0.0) == ""
        os.write(typing, b"q")
        assert read_key(60.0) == "q"


def test_without_a_terminal_nothing_changes_and_no_key_comes(monkeypatch, tmp_path):
    with (tmp_path / "no-terminal").open("w+") as file:
        monkeypatch.setattr(sys, "stdin", file)
        with without_echo(key_by_key=True):
            assert read_key(0.01) == ""


def test_ctrl_c_is_noted_beside_its_handler_and_not_after_the_context():
    with noting_interrupts() as came:
        assert not came()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert came() and came()
    with noting_interrupts() as came, pytest.raises(RuntimeError):
        assert not came()
        raise RuntimeError
    assert signal.set_wakeup_fd(-1) == -1
