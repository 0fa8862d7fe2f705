"""README's commands, every one in its order, as a person pastes them into a fresh checkout with a fresh home."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PORTS = {"Prefect": 4200, "MLflow": 5000, "the gateway": 8080}
# So long that only what hangs takes it, on a machine that other programs share.
LIMIT_S = 1800

# Commands that are run elsewhere: by the tests of the wheel, or because they are this suite itself.
ELSEWHERE = {
    "make test": "this suite",
    'pipx install "cherry_framework-0.1.0-py3-none-any.whl[s3,gpu]"': "by tests/packaging/test_wheel.py",
    "cherry demo": "as `make demo`",
    "cherry-launch --cluster cluster.yaml train.py --config runs/mine/config.yaml --run_dir runs/mine": (
        "on hosts that are there, by tests/chaos/test_lost_hosts.py"
    ),
    "cherry run configs/tiny.yaml cluster=cluster.yaml launch.nnodes=2 launch.nproc_per_node=4": (
        "on hosts that are there, by tests/e2e/test_providers.py"
    ),
    "cherry run configs/tiny.yaml cluster=slurm.yaml launch.nnodes=2": (
        "on a Slurm cluster, by tests/e2e/test_providers.py"
    ),
    "cherry-launch --cluster slurm.yaml --nnodes=2 train.py --config runs/mine/config.yaml --run_dir runs/mine": (
        "on a Slurm cluster, by tests/chaos/test_slurm.py"
    ),
}
# Commands that take seconds, and need none before them.
QUICK = ("cherry doctor", "cherry plan", "anything infer --help")
# What a command's output holds besides its exit code, which curl's, for one, says nothing of.
SHOWS = {
    "make demo": r"held-out +\d\.\d+ bits per byte[\s\S]+runs/demo/summary\.json",
    "cherry status": r"slower[\s\S]+mine[\s\S]+demo",
    "cherry compare": r"train\.learning_rate",
    "cherry top": r"step (\d+) of \1, loss",
    "cherry logs": r"step (\d+)/\1 loss",
    "cherry setup": r"train-tiny, train-671b, deploy, retrain-weekly",
    "from anything.client": r"\S",
    "curl": r'\{"output": ?"',
}
# A server whose page is asked for answers a moment after its command; `cherry setup` waits for Prefect's by itself.
SERVERS = {"mlflow ui": f"http://127.0.0.1:{PORTS['MLflow']}/health"}


@dataclass(frozen=True)
class Command:
    """One command of a console block, or a Python block; the output that the block shows, and its line in README."""

    text: str
    output: str
    line: int
    program: tuple[str, ...] = ("bash", "-c")


def commands(markdown: str) -> list[Command]:
    """Commands of console blocks, Python blocks and indented blocks, in order; comments and line breaks undone."""
    found = []
    blocks = r"^```(console|python)\n(.*?)^```|^    (make .*?)$"
    for block in re.finditer(blocks, markdown, re.DOTALL | re.MULTILINE):
        line = markdown.count("\n", 0, block.start()) + 1
        if block[3]:
            found.append(Command(re.sub(r"\s+# .*", "", block[3]), "", line))
            continue
        if block[1] == "python":
            found.append(Command(block[2], "", line, ("python", "-c")))
            continue
        joined = re.sub(r"\\\n\s*", "", block[2])
        for part in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", joined, re.MULTILINE):
            found.append(Command(re.sub(r"\s+# .*", "", part[0]).strip(), part[1], line))
    return found


@dataclass
class Shell:
    """What a terminal keeps between commands: directory, exported variables, programs in the background."""

    directory: Path
    environment: dict[str, str]
    background: list[tuple[Command, subprocess.Popen[bytes], Path]] = field(default_factory=list)

    def run(self, command: Command) -> tuple[int, str]:
        """Exit code and output of a command; one that ends in & goes on in the background."""
        if command.text.startswith("export "):
            name, _, value = command.text.removeprefix("export ").partition("=")
            self.environment[name] = value
            return 0, ""
        if command.text.endswith("&"):
            self._start(command)
            return 0, ""
        done = subprocess.run(
            [*command.program, command.text],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
            start_new_session=True,
        )
        return done.returncode, done.stdout.decode()

    def _start(self, command: Command) -> None:
        log = self.directory / f"background-{len(self.background)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command.program, f"exec {command.text.removesuffix('&')}"],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.background.append((command, process, log))
        for server, address in SERVERS.items():
            if command.text.startswith(server):
                self._wait_for(address)

    def _wait_for(self, address: str) -> None:
        end = time.monotonic() + LIMIT_S
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(address, trust_env=False, timeout=60).is_success:
                    return
            self.check_background()
            assert time.monotonic() < end, self.logs()
            time.sleep(0.1)

    def check_background(self) -> None:
        """See that what was started in the background is there still."""
        ended = {command.text: process.poll() for command, process, _ in self.background if process.poll() is not None}
        assert not ended, f"ended: {ended}\n{self.logs()}"

    def logs(self) -> str:
        """The last lines of every program in the background."""
        return "\n".join(f"$ {command.text}\n{log.read_text()[-4000:]}" for command, _, log in self.background)

    def close(self) -> None:
        """End the programs in the background, the youngest first, and what `cherry deploy` left serving."""
        subprocess.run(["cherry", "stop"], cwd=self.directory, env=self.environment, capture_output=True, check=False)
        for _, process, _ in reversed(self.background):
            tree = [process_ for process_ in [psutil.Process(process.pid)] if process.poll() is None]
            tree += [child for one in tree for child in one.children(recursive=True)]
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            _, alive = psutil.wait_procs(tree, timeout=20)
            for one in alive:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def copy_checkout(to: Path) -> None:
    """Copy what a clone of this working tree would hold, with this environment as its finished `make install`."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in names:
        if name and os.path.lexists(ROOT / name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name, follow_symlinks=False)
    (to / ".venv").mkdir()
    for one in Path(sys.prefix).iterdir():
        if one.name != ".installed":
            (to / ".venv" / one.name).symlink_to(one)
    (to / ".venv" / ".installed").touch()


@pytest.fixture
def free_ports() -> None:
    """Skips where a program listens on a port that README's commands use."""
    if taken := [f"{port} ({what}'s)" for what, port in PORTS.items() if not is_free(port)]:
        pytest.skip(f"README's commands use the default ports, and another program listens on {', '.join(taken)}")


@pytest.fixture
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A terminal in a fresh checkout, with a home of its own."""
    checkout = tmp_path_factory.mktemp("readme") / "cherry"
    copy_checkout(checkout)
    home = checkout.parent / "home"
    home.mkdir()
    ours = ("PREFECT_", "MLFLOW_", "PYTEST_", "MAKE", "MFLAGS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    shell = Shell(
        checkout,
        kept
        | {
            "HOME": str(home),
            "PATH": f"{checkout}/.venv/bin{os.pathsep}{os.environ['PATH']}",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "NO_PROXY": "127.0.0.1",
            "COLUMNS": "120",
        },
    )
    try:
        yield shell
    finally:
        shell.close()


def flow_runs(api_url: str) -> list[dict[str, str]]:
    """Runs that the schedule does not plan for later weeks."""
    answer = httpx.post(f"{api_url}/flow_runs/filter", json={}, trust_env=False, timeout=60)
    runs = [run for run in answer.raise_for_status().json() if not run["auto_scheduled"]]
    return [{key: run[key] for key in ("name", "state_type", "state_name")} for run in runs]


def wait_for_flow_runs(shell: Shell) -> None:
    """Wait until what `prefect deployment run` asked for has ended, and see that it ended well."""
    end = time.monotonic() + LIMIT_S
    while True:
        shell.check_background()
        runs = flow_runs(shell.environment["PREFECT_API_URL"])
        if {run["state_type"] for run in runs} == {"COMPLETED"}:
            return
        failed = [run for run in runs if run["state_type"] in ("FAILED", "CRASHED", "CANCELLED")]
        assert not failed, f"{failed}\n{shell.logs()}"
        assert time.monotonic() < end, f"{runs}\n{shell.logs()}"
        time.sleep(0.5)


@pytest.mark.slow
def test_commands_that_start_nothing_work_as_written(shell: Shell) -> None:
    """Exit code 0, or the output that README shows, of the commands that take seconds and need no earlier one."""
    found = [one for one in commands(README) if one.text.startswith(QUICK) or "--dry-run" in one.text or one.output]
    assert len(found) >= 7
    for command in found:
        code, output = shell.run(command)
        place = f"README.md line {command.line}: {command.text}"
        if command.output:
            assert output.strip() == command.output.strip(), place
        else:
            assert code == 0, f"{place} ended with {code}\n{output}"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT_S)
@pytest.mark.usefixtures("free_ports")
def test_every_command_works_as_written(shell: Shell) -> None:
    """Exit code 0, or the output that README shows; programs in the background go on until the end."""
    deployments, shown = 0, set()
    for command in commands(README):
        if command.text in ELSEWHERE:
            continue
        if deployments and not command.text.startswith("prefect"):
            wait_for_flow_runs(shell)
            deployments = 0
        started = time.monotonic()
        code, output = shell.run(command)
        print(f"{time.monotonic() - started:6.1f} s  {code}  {command.text}", flush=True)
        place = f"README.md line {command.line}: {command.text}"
        if command.output:
            assert output.strip() == command.output.strip(), place
        else:
            assert code == 0, f"{place} ended with {code}\n{output}\n{shell.logs()}"
        for beginning, pattern in SHOWS.items():
            if command.text.startswith(beginning):
                assert re.search(pattern, output), f"{place} did not show {pattern}\n{output}"
                shown.add(beginning)
        deployments += command.text.startswith("prefect deployment run")
    shell.check_background()
    assert shown == set(SHOWS), "README has other commands by now"


def test_commands_are_read_from_console_blocks() -> None:
    text = "\n    make demo   # all\n\n```console\n$ cherry a b \\\n      c   # why\nerror: x\n  y\n$ d &\n```\n"
    text += "\n```\n$ no\n```\n\n```python\nprint(1)  # one\n```\n"
    assert [(found.text, found.output) for found in commands(text)] == [
        ("make demo", ""),
        ("cherry a b c", "error: x\n  y\n"),
        ("d &", ""),
        ("print(1)  # one\n", ""),
    ]
    assert len(commands(README)) > 20
