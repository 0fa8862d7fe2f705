"""Hosts over real ssh for the tests of a file."""

from collections.abc import Iterator

import pytest

from tests.hosts import LabHosts, lab_hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHosts]:
    """node1 and node2."""
    yield from lab_hosts(tmp_path_factory.mktemp("hosts") / "lab", 2)


@pytest.fixture
def at_home(hosts: LabHosts, monkeypatch: pytest.MonkeyPatch) -> LabHosts:
    """The hosts, with the ssh configuration that names them as this process's own."""
    monkeypatch.setenv("HOME", str(hosts.home))
    return hosts
