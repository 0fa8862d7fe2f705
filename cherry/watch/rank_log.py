"""A rank's own log: its records, whatever it prints, and on SIGUSR1 the stacks of its threads.

`train/rank-<n>.log` in the run directory holds it, which all hosts of a job share, or whose files are carried.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TextIO

from base import storage
from base.errors import storage_errors


def rank_log(directory: Path, rank: int) -> Path:
    """The log of a rank, where `directory` is `train/` of the run directory."""
    return directory / f"rank-{rank}.log"


def log_to_file(run_directory: str, rank: int, *, prints: bool) -> None:
    """Log to the rank's file from now on; SIGUSR1 adds the stacks of all threads.

    Args:
        prints: copy what Python prints there too. A debugger needs the terminal for itself.

    Raises:
        StorageError: the file cannot be written.
    """
    directory = Path(storage.local_path(run_directory)) / "train"
    with storage_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(rank_log(directory, rank))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("cherry").setLevel(logging.INFO)
    logging.getLogger("cherry").info("rank %d on %s, pid %d", rank, socket.gethostname(), os.getpid())
    # Python writes them itself, whatever the threads wait for; see "A run hangs" in docs/runbook.md.
    assert handler.stream is not None
    faulthandler.register(signal.SIGUSR1, file=handler.stream, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # the launcher starts its ranks with it blocked
    if prints:
        sys.stdout = _Copied(sys.stdout, handler, "stdout")
        sys.stderr = _Copied(sys.stderr, handler, "stderr")


class _Copied(io.TextIOBase, TextIO):
    """A text stream whose finished lines go to a log as well.

    They go to the one handler, past all loggers: a handler of a library may print records itself.
    """

    def __init__(self, stream: TextIO, handler: logging.Handler, name: str) -> None:
        self._stream, self._handler, self._name = stream, handler, name
        self._unfinished = ""

    def write(self, text: str) -> int:
        """Write the text, and log the lines that it ends."""
        written = self._stream.write(text)
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            record = logging.LogRecord(self._name, logging.INFO, "", 0, line, None, None)
            self._handler.handle(record)
        return written

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def fileno(self) -> int:
        """File descriptor of the stream."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream."""
        return self._stream.encoding
