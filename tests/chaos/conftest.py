"""Hosts that can be lost, and jobs on them under a supervisor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import LabHosts, lab_hosts
from tests.supervised import FLAGS, Supervised


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[LabHosts]:
    """node1, node2 and node3."""
    yield from lab_hosts(tmp_path / "lab", 3)


@pytest.fixture
def supervised(make_job: Callable[[str], Any], hosts: LabHosts, environment: dict[str, str]) -> Iterator[Supervised]:
    """A job on these hosts."""
    job = Supervised(make_job("job"), hosts, environment)
    yield job
    job.end()


@pytest.fixture(scope="module")
def whole(new_job: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the same training, unbroken, by two ranks on this machine."""
    job = new_job(tmp_path_factory.mktemp("whole") / "job")
    ended = job.run(*FLAGS, ranks=2)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return job.losses
