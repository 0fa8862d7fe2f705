"""Agent: the program that holds a job's ranks on a host, as long as its supervisor holds a lease on it.

    python -P -m cherry.remote.agent       (over ssh; JSON lines on standard input and output)

From the supervisor: `ask` (for facts), `listen`, `connect`, `fetch` (prepared data), `start` (the launcher), `tock`,
`signal`, `end`. To the supervisor: `facts`, `listens`, `unreachable`, `fetched`, `tick`, `line`, `busy`, `figures`,
`ended`. A tick holds the time here,
and a tock sends it back: the lease ends `lease_s` after the newest tick that came back. However long messages are on
their way, a supervisor so knows when the ranks of a host that it cannot reach are gone: the lease, and `KILL_S`, after
the last tock that it sent.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any

import psutil

from base.errors import ERROR_FILE_VARIABLE, CherryError, WorkerLostError, error_record
from base.json_lines import JsonLinesReader, parse_lines
from base.progress import PROGRESS_FILE_VARIABLE
from base.scratch import scratch_folder
from cherry.remote.facts import collect_facts
from cherry.remote.prepared_data import copy_committed
from cherry.remote.reach import listen, unreachable

TICK_S = 2.0
"""Seconds between two ticks."""
TERMINATE_S = 3.0
"""Seconds from SIGTERM to SIGKILL."""
KILL_S = TERMINATE_S + 2.0
"""Seconds that the end of a job's processes takes at most."""
# Less than TERMINATE_S, so that the launcher ends its ranks itself.
_LAUNCHER_GRACE_S = "2"
_POLL_S = 0.2
# As much as a pipe would hold back: a program that prints faster than the network takes waits.
_MOST_MESSAGES = 1000


class Sender:
    """Messages to the supervisor, from a thread of their own: a network that is stuck never holds up the lease."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_MESSAGES)
        self._thread = threading.Thread(target=self._write, name="sender", daemon=True)
        self._thread.start()

    def put(self, **message: Any) -> None:
        """Send a message; waits while too many are unsent."""
        self._messages.put(message)

    def offer(self, **message: Any) -> None:
        """Send a message, or leave it out while too many are unsent; never waits."""
        with suppress(queue.Full):
            self._messages.put_nowait(message)

    def close(self, timeout_s: float, **message: Any) -> None:
        """Send a last message, if there is one, and wait until all is sent."""
        with suppress(queue.Full):
            for last in (*([message] if message else []), None):
                self._messages.put(last, timeout=timeout_s)
        self._thread.join(timeout_s)

    def _write(self) -> None:
        while (message := self._messages.get()) is not None:
            data = memoryview(json.dumps(message).encode() + b"\n")
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except OSError:  # the supervisor is gone, which the end of standard input says too
                    break


class Job:
    """The launcher on this host in a session of its own, with its output and its error."""

    def __init__(self, arguments: list[str], environment: dict[str, str], sender: Sender) -> None:
        self._scratch = ExitStack()
        folder = self._scratch.enter_context(scratch_folder("cherry-agent"))
        self._error, progress = folder / "error.json", folder / "progress.jsonl"
        self._sender, self._reports = sender, JsonLinesReader(progress)
        self._fractions: dict[str, float] = {}
        self._reading = threading.Lock()
        own = {
            "PYTHONUNBUFFERED": "1",
            "CHERRY_PARENT": str(os.getpid()),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": _LAUNCHER_GRACE_S,
            ERROR_FILE_VARIABLE: str(self._error),
            PROGRESS_FILE_VARIABLE: str(progress),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cherry.launcher", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, **own},
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._pass_on, name="output", daemon=True)
        self._thread.start()

    def _pass_on(self) -> None:
        """Send lines, each with the fraction that it reports, if it does; a report is written before its line."""
        assert self.process.stdout is not None
        for data in self.process.stdout:
            line = data.decode(errors="replace").rstrip("\n")
            self.send_reports()
            self._sender.put(line=line, fraction=self._fractions.pop(line, None))

    def send_reports(self) -> None:
        """Send what is reported besides lines, and keep the fractions of lines to come; never waits."""
        with self._reading:
            for report in self._reports.read_new() or []:
                if "line" in report:
                    self._fractions[report["line"]] = report["fraction"]
                elif "figures" in report:
                    self._sender.offer(figures=report["figures"])
                else:
                    self._sender.offer(busy=report.get("busy"))

    def signal(self, name: str) -> None:
        """Send a signal to the launcher."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.Signals[name])

    def end(self) -> None:
        """End the launcher and all below it: SIGTERM, `TERMINATE_S`, SIGKILL. Its ranks never outlive it."""
        if self.process.poll() is not None:
            return
        try:
            root = psutil.Process(self.process.pid)
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(TERMINATE_S)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def ending(self) -> dict[str, Any]:
        """Exit code of the launcher that has ended (negative for a signal), and its error's record."""
        self._thread.join(TERMINATE_S)  # a process that left the tree may hold the pipe
        error = None
        with suppress(OSError, ValueError):
            error = json.loads(self._error.read_text())
        self._scratch.close()
        return {"code": self.process.returncode, "error": error}


class Agent:
    """The loop over messages, ticks and the job; it returns when the supervisor has left or the job has ended."""

    def __init__(self, source: int, sender: Sender) -> None:
        self._source, self._sender = source, sender
        self._unread = b""
        self._job: Job | None = None
        self._lease_s, self._leased_at = 0.0, time.monotonic()
        self._next_tick = 0.0
        self._open = True

    def run(self) -> None:
        """Serve one supervisor and at most one job."""
        try:
            while self._open and not self._is_over():
                if time.monotonic() >= self._next_tick:
                    self._sender.offer(tick=time.monotonic())
                    self._next_tick = time.monotonic() + TICK_S
                if self._job is not None:
                    self._job.send_reports()
                if select.select([self._source], [], [], _POLL_S)[0]:
                    self._read()
        finally:
            if self._job is not None:
                self._job.end()
                self._sender.close(TERMINATE_S, ended=self._job.ending())

    def _is_over(self) -> bool:
        if self._job is None:
            return False
        return self._job.process.poll() is not None or time.monotonic() > self._leased_at + self._lease_s

    def _read(self) -> None:
        data = os.read(self._source, 1 << 16)
        self._open = bool(data)
        finished, _, self._unread = (self._unread + data).rpartition(b"\n")
        for message in parse_lines(finished):
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if "tock" in message:
            self._leased_at = max(self._leased_at, float(message["tock"]))
        if "ask" in message:
            facts = collect_facts(message["ask"].get("directory"), message["ask"].get("mark"))
            self._sender.put(facts=facts.model_dump(mode="json"))
        if "listen" in message:
            self._sender.put(listens=listen())
        if "connect" in message:
            self._sender.put(unreachable=unreachable(message["connect"]))
        if "fetch" in message:
            # By a thread: it may take minutes, and ticks go on.
            threading.Thread(target=self._fetch, args=(message["fetch"],), name="fetch", daemon=True).start()
        if "start" in message:
            self._start(message["start"])
        if "signal" in message and self._job is not None:
            self._job.signal(message["signal"])
        if "end" in message:
            self._open = False

    def _fetch(self, order: dict[str, Any]) -> None:
        """Copy prepared data to this host, with the credentials that come with the order."""
        os.environ.update(order["environment"])
        error = None
        try:
            copy_committed(order["data"], order["directory"])
        except CherryError as failure:
            error = error_record(failure)
        except Exception as failure:  # a bug, which the supervisor must not wait for
            error = error_record(WorkerLostError(f"{type(failure).__name__}: {failure}"))
        self._sender.put(fetched={"error": error})

    def _start(self, start: dict[str, Any]) -> None:
        """Start the job, unless the order was so long on its way that the lease is over."""
        self._lease_s, self._leased_at = float(start["lease_s"]), float(start["tock"])
        if time.monotonic() > self._leased_at + self._lease_s:
            self._open = False
            return
        self._job = Job(start["arguments"], start["environment"], self._sender)


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Run the agent on standard input and output."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    sender = Sender(os.dup(1))
    os.dup2(2, 1)  # a library's print is no message
    Agent(0, sender).run()


if __name__ == "__main__":
    main()
