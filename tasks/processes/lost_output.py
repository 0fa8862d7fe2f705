"""Standard output and error that may lose their reader: a run goes on when a worker or a pager ends that read them."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys

from typing_extensions import Buffer

# The reader of a pipe is gone; the terminal is gone.
_READER_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)


def outlive_readers() -> None:
    """Let this process write its standard output and error to nowhere once their reader is gone, instead of ending.

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

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Buffer) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            if error.errno not in _READER_GONE:
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._descriptor)
        os.close(null)
        return memoryview(data).nbytes
