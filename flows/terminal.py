"""The terminal's input while something is drawn on it: typed keys are not printed, or are read one by one."""

from __future__ import annotations

import select
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def without_echo(*, key_by_key: bool = False) -> Iterator[None]:
    """Keep the terminal from printing typed keys and ^C among what is drawn, which would be drawn beside itself.

    Args:
        key_by_key: a key can be read at once, not only after its line has ended; see `read_key`.
    """
    try:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, AttributeError, termios.error):  # no terminal to type on
        yield
        return
    quiet = [*before]
    quiet[3] &= ~(termios.ECHO | (termios.ICANON if key_by_key else 0))
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with suppress(termios.error):  # it was closed meanwhile
            termios.tcsetattr(terminal, termios.TCSANOW, before)


def read_key(timeout_s: float) -> str:
    """The key that is typed within this time; empty when none is, or when there is no terminal to type on."""
    if not sys.stdin.isatty():
        time.sleep(timeout_s)
        return ""
    return sys.stdin.read(1) if select.select([sys.stdin], [], [], timeout_s)[0] else ""
