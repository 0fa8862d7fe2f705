"""Fence of a run: the newest attempt goes on, every older one is stopped, on a disk and on an object store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from base import storage
from base.errors import SupersededError
from cherry.checkpoint.fence import Fence


@pytest.fixture(params=["disk", "s3"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Directory of checkpoints, on a disk and on an object store."""
    return str(tmp_path / "train") if request.param == "disk" else f"{request.getfixturevalue('s3')}/checkpoints"


def is_alive(fence: Fence) -> bool:
    try:
        fence.check()
    except SupersededError:
        return False
    return True


def test_the_second_attempt_stops_the_first_and_is_not_stopped_by_it(directory: str) -> None:
    first = Fence(directory)
    first.check()
    second = Fence(directory)
    second.check()
    with pytest.raises(SupersededError, match="attempt 2 took over from attempt 1"):
        first.check()
    second.check()


def test_of_attempts_that_start_together_exactly_one_goes_on(directory: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        fences = list(pool.map(lambda _: Fence(directory), range(24)))
    assert sorted(fence.epoch for fence in fences) == list(range(1, 25))
    assert [fence.epoch for fence in fences if is_alive(fence)] == [24]


def test_of_hosts_that_share_the_checkpoints_alone_exactly_one_goes_on(tmp_path: Path, directory: str) -> None:
    own = [str(tmp_path / f"host-{number % 4}") for number in range(16)]
    for _ in range(5):
        Fence(own[0])  # attempts that saved elsewhere
    with ThreadPoolExecutor(16) as pool:
        fences = list(pool.map(lambda host: Fence(host, directory), own))
    assert len({fence.epoch for fence in fences}) == len(fences)
    alive = [fence for fence in fences if is_alive(fence)]
    assert [fence.epoch for fence in alive] == [max(fence.epoch for fence in fences)]
    elsewhere = Fence(alive[0].directories[0], str(tmp_path / "another"))
    assert elsewhere.epoch > alive[0].epoch
    assert not is_alive(alive[0]) and is_alive(elsewhere), "the run directory is fenced too"


def test_a_directory_that_was_moved_away_is_told_and_no_other_attempt(tmp_path: Path) -> None:
    fence = Fence(str(tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    with pytest.raises(SupersededError, match=r"run is not the directory that this attempt began in: it was moved"):
        fence.check()
    (tmp_path / "run").rmdir()
    (tmp_path / "moved").rename(tmp_path / "run")
    fence.check()


_ATTEMPT = """
import json, sys
from cherry.checkpoint.fence import Fence
fence = Fence(*sys.argv[1:])
print(json.dumps(fence.epoch))
"""


def test_processes_exclude_each_other_by_the_object_store(s3: str, tmp_path: Path, environment: dict[str, str]) -> None:
    directory = f"{s3}/checkpoints"

    def attempt(host: str) -> int:
        command = [sys.executable, "-c", _ATTEMPT, str(tmp_path / host), directory]
        leading = {**os.environ, "PYTHONPATH": environment["PYTHONPATH"]}
        ended = subprocess.run(command, env=leading, capture_output=True, text=True, check=True)
        return int(json.loads(ended.stdout))

    here = Fence(str(tmp_path / "here"), directory)
    with ThreadPoolExecutor(2) as pool:
        epochs = list(pool.map(attempt, ["one", "two"]))
    assert sorted([here.epoch, *epochs]) == [1, 2, 3]
    assert storage.list_names(directory) == ["epoch-000001", "epoch-000002", "epoch-000003"]
    with pytest.raises(SupersededError, match="attempt 3 took over from attempt 1"):
        here.check()
