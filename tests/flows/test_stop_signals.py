"""Signals that end a command; tests/e2e/test_cancel.py sends them to whole runs."""

import signal

import pytest

from flows.stop_signals import ending_by_signals


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_context_after_its_clean_up_with_the_shells_code(sent, code):
    before, cleaned_up = signal.getsignal(sent), []
    with pytest.raises(SystemExit) as ended, ending_by_signals():
        try:
            signal.raise_signal(sent)  # to this thread: another may take one from `os.kill` later
        finally:
            signal.raise_signal(signal.SIGHUP)  # the shell's, after the terminal's
            cleaned_up.append(True)
    assert (ended.value.code, cleaned_up) == (code, [True])
    assert signal.getsignal(sent) is before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_by_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
