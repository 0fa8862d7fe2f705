"""SIGTERM and SIGHUP for a command that runs a flow: they end it as Ctrl-C does, with the exit code 128 + n."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from prefect.exceptions import TerminationSignal

_SHELL_SIGNAL = 128


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """Context that SIGTERM (`kill`, a job's time limit) and SIGHUP (a closed terminal) leave by an exception.

    It is Prefect's own, so that flows inside say in their state what ended them; Prefect handles only SIGTERM. SIGHUP
    stays ignored where it is, as by nohup.

    Raises:
        SystemExit: 128 + n, once everything inside has ended.
    """
    first: int | None = None

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        if first is not None and number == signal.SIGHUP:
            return  # the shell sends it too, which must not disturb the clean-up
        first = first or number
        raise TerminationSignal(first)

    handled = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {one: signal.signal(one, end) for one in handled}
    try:
        yield
    except TerminationSignal as error:
        raise SystemExit(_SHELL_SIGNAL + error.signal) from None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
