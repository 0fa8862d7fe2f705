"""What tests of several packages share: an S3 server over HTTP, programs of several ranks, tiny training jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cherry.launcher import die_with_parent
from tests.object_stores import leading_to, make_bucket, rclone, seaweedfs
from tests.training_job import Job, environment_of_programs, prepare_documents, write_config
from tests.watcher import watch_this_process

ROOT = Path(__file__).resolve().parents[1]
if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: the threads of several processes would wait for each other's cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_sessionstart() -> None:
    """Let a process of its own end what this session starts, should the session be killed."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell leaves it for what it starts in the background: programs that tests interrupt would not notice.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if "MAKELEVEL" in os.environ:
        die_with_parent(signal.SIGTERM, os.getppid())  # a killed make ends its tests
    watch_this_process()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the long groups start first, where several processes share the tests."""
    slow: dict[Path, bool] = {}
    for item in items:
        slow[item.path] = slow.get(item.path, False) or item.get_closest_marker("slow") is not None
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (item.path.parent.name != "e2e", not slow[item.path]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Say which tests share a process: those of a file, for its fixtures; all of e2e/, for its server and its runs.

    README's commands, a file of e2e/, have servers of their own and run beside the rest of it.

    Marks of the group would do, but with pytest 9.2 xdist 3.8 does not see them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            return "e2e" if path.startswith("tests/e2e/") and path != "tests/e2e/test_readme.py" else path

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Gives signals back what they did before a test: programs' functions change it, and later programs inherit it."""
    changed = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before, blocked = [signal.getsignal(one) for one in changed], signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    for one, handler in zip(changed, before, strict=True):
        signal.signal(one, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an S3 server that honours conditional puts; it has a bucket called `bucket`."""
    with seaweedfs(tmp_path_factory.mktemp("s3")) as url:
        make_bucket(url)
        yield url


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of a fresh, empty place in an object store; the environment leads there, also that of programs."""
    with leading_to(s3_endpoint, monkeypatch):
        yield f"s3://bucket/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def unconditional_s3(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As `s3`, in a store that ignores the condition of a put and overwrites."""
    with rclone(tmp_path_factory.mktemp("rclone")) as url, leading_to(url, monkeypatch):
        make_bucket(url)
        yield f"s3://bucket/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of so many KiB for the test; skips the test where that is not allowed."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        directory = tmp_path / "small"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(directory)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount program")
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What programs of tests see: this checkout first, one thread each."""
    return environment_of_programs()


@pytest.fixture(scope="session")
def run_together(environment: dict[str, str]) -> Callable[[list[list[str]]], None]:
    """Runs programs side by side; one that fails ends the others, which would wait for it."""
    return lambda commands: _run_together(commands, environment)


def _run_together(commands: list[list[str]], environment: dict[str, str]) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    started = [subprocess.Popen(command, text=True, env=environment, **pipes) for command in commands]

    def wait(process: subprocess.Popen[str]) -> str:
        output = process.communicate()[0]
        if process.returncode:
            for other in started:
                other.kill()
        return output

    try:
        with ThreadPoolExecutor(len(started)) as pool:
            output = list(pool.map(wait, started))
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(output)


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of 60 small documents, made once."""
    return prepare_documents(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def job_config(tmp_path_factory: pytest.TempPathFactory, prepared_data: Path) -> Path:
    """A config that takes a second to train: every part of the architecture, two layers."""
    return write_config(tmp_path_factory.mktemp("config") / "mini.yaml", prepared_data)


@pytest.fixture(scope="session")
def new_job(job_config: Path, prepared_data: Path) -> Callable[[Path], Job]:
    """Makes a job in a new directory."""
    return lambda directory: Job(directory, job_config, prepared_data)


@pytest.fixture
def make_job(tmp_path: Path, new_job: Callable[[Path], Job]) -> Callable[[str], Job]:
    """Makes jobs by name inside the test's own directory."""
    return lambda name: new_job(tmp_path / name)


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installed package that adds the provider `two-hosts`, importable here and in programs."""
    folder = ROOT / "tests" / "plugins"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    return folder
