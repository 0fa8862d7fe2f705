"""The terminal's input: Ctrl-C, and keys while something is drawn, which are not printed, or are read one by one."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C has come inside the context. Who handles it does so as ever: only a note is taken beside.

    Some libraries make another exception of a KeyboardInterrupt, and then nothing else tells of it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # no other thread gets signals
        return
    came = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def has_come() -> bool:
        with suppress(BlockingIOError):
            if signal.SIGINT in os.read(reading, 1 << 16):
                came.set()
        return came.is_set()

    try:
        yield has_come
    finally:
        signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


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
