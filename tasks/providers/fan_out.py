"""Fan-out: the commands that start a job's hosts, run side by side as one program.

    python -m tasks.providers.fan_out commands.json

The first command's output passes unchanged, the others' with the host's address before each line. When one command
fails the others are ended too, and the program ends with the error of the one that explains the failure.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from base import storage
from base.errors import ERROR_FILE_VARIABLE, USER_EXIT_CODES, ConfigError, run_program
from base.scratch import scratch_folder
from cherry.launcher import die_with_parent
from tasks.processes.process import error_of
from tasks.processes.programs import module_command
from tasks.providers.protocol import Hosts

COMMANDS_FILE = "commands.json"
# A host whose peer failed ends by itself, with an error of its own, when its collective breaks. Then SIGTERM, on which
# a launcher takes up to 10 s for its ranks, then SIGKILL.
_PEER_GRACE_S = 20.0
_TERMINATE_GRACE_S = 12.0
_KEPT_LINES = 40


def one_command(hosts: Hosts, commands: Sequence[Sequence[str]], folder: Path) -> list[str]:
    """Command that runs all `commands`; several are written to commands.json in `folder` for the fan-out program."""
    if len(commands) == 1:
        return list(commands[0])
    path = folder / COMMANDS_FILE
    storage.write_json(str(path), {"names": [host.address for host in hosts.hosts], "commands": commands})
    return module_command("tasks.providers.fan_out", [str(path)])


class _Member:
    """One command, its last lines of output, and a thread that passes them on."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        prefix: str,
        error_file: Path,
        output: threading.Lock,
        ended: queue.Queue[_Member],
    ) -> None:
        self.name, self.prefix, self.error_file, self.output = name, prefix, error_file, output
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "CHERRY_PARENT": str(os.getpid()), ERROR_FILE_VARIABLE: str(error_file)},
        )
        self.thread = threading.Thread(target=self._pass_on, args=(ended,), name=name, daemon=True)
        self.thread.start()

    def _pass_on(self, ended: queue.Queue[_Member]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            with self.output:  # print writes a line and its end apart, between which another thread's line would come
                print(self.prefix + line.rstrip("\n"), flush=True)
        self.process.wait()
        ended.put(self)


def fan_out(names: Sequence[str], commands: Sequence[Sequence[str]]) -> None:
    """Run all commands until all have ended well, or one has failed and the others are ended.

    Raises:
        CherryError: that of the failed command that explains the others.
    """
    with scratch_folder("cherry-fan-out") as folder:
        _run_all(names, commands, folder)


def _run_all(names: Sequence[str], commands: Sequence[Sequence[str]], folder: Path) -> None:
    ended: queue.Queue[_Member] = queue.Queue()
    output = threading.Lock()
    members: list[_Member] = []
    failed: list[_Member] = []
    try:
        for number, (name, command) in enumerate(zip(names, commands, strict=True)):
            prefix, error_file = f"{name}: " if number else "", folder / f"{number}.json"
            members.append(_Member(name, command, prefix, error_file, output, ended))
        for _ in members:
            try:
                member = ended.get(timeout=_PEER_GRACE_S if failed else None)
            except queue.Empty:
                break  # the rest would wait for a host that is gone
            if member.process.returncode:
                failed.append(member)
    finally:
        _end(members)
    if failed:
        # A user error explains the failures of the other hosts; of equals, the earliest.
        cause = min(failed, key=lambda member: member.process.returncode not in USER_EXIT_CODES)
        name = f"the launcher on {cause.name}"
        raise error_of(cause.process.returncode, list(cause.lines), name, error_file=cause.error_file)


def _end(members: Sequence[_Member]) -> None:
    for member in members:
        if member.process.poll() is None:
            member.process.terminate()
    for member in members:
        try:
            member.process.wait(_TERMINATE_GRACE_S)
        except subprocess.TimeoutExpired:
            member.process.kill()
            member.process.wait()
        member.thread.join(_TERMINATE_GRACE_S)


def _stop(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> None:
    """Read commands.json and run what it lists."""
    if len(sys.argv) != 2:
        raise ConfigError(f"tasks.providers.fan_out: takes one argument, a commands.json (got {len(sys.argv) - 1})")
    signal.signal(signal.SIGTERM, _stop)
    if parent := os.environ.get("CHERRY_PARENT"):
        die_with_parent(signal.SIGTERM, int(parent))
    job = storage.read_json(sys.argv[1])
    fan_out(job["names"], job["commands"])


if __name__ == "__main__":
    raise SystemExit(run_program(main))
