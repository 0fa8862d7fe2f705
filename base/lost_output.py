"""Standard output and error that may fail: a run goes on when who read them ends, or the disk that has them is full."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

# The reader of a pipe is gone; the terminal is gone.
_READER_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def outlive_output() -> None:
    """Let this process go on where its standard output or error cannot be written, instead of ending.

    Once their reader is gone they go nowhere; on a full disk, lines are lost until there is space.
    Prefect's worker reads a flow's output from a pipe. When it is killed, the next line would end the flow: rich, which
    prints Prefect's log, exits the program on a broken pipe.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # replaced before: its owner decides
        stream.flush()
        lasting = io.TextIOWrapper(
            io.BufferedWriter(_LastingFile(stream.fileno())), stream.encoding, stream.errors, line_buffering=True
        )
        setattr(sys, name, lasting)
        _hand_to_handlers(stream, lasting)


def _hand_to_handlers(stream: io.TextIOWrapper, lasting: io.TextIOWrapper) -> None:
    """Give log handlers that were made with `stream` the one in its place; Prefect's have it in a rich console."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
            handler.setStream(lasting)
        console = getattr(handler, "console", None)
        if console is not None and console.file is stream:
            console.file = lasting


class _LastingFile(io.RawIOBase):
    """A file descriptor that is pointed at the null device when nobody reads it any more."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._is_cut = False

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Buffer) -> int:
        count = memoryview(data).nbytes
        try:
            if self._is_cut:  # the last line that was written has no end
                os.write(self._descriptor, b"\n")
                self._is_cut = False
            written = os.write(self._descriptor, data)
        except OSError as error:
            if error.errno in _NO_SPACE:
                self._is_cut = True
                return count
            if error.errno not in _READER_GONE:
                raise
        else:
            return written
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._descriptor)
        os.close(null)
        return count
