"""Clusters that are held without a run: taken once, given back after a failure, and named to runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.errors import ConfigError, MissingFileError, OperationalError
from cherry.cluster import read_cluster
from tasks.clusters.give_back import give_back
from tasks.clusters.keep import take
from tasks.clusters.taken import list_taken


def test_a_cluster_is_taken_once_and_runs_find_its_hosts_by_a_cluster_file(runs, cluster_file, calls):
    directory, hosts, is_new = take(cluster_file, runs, name=None, nodes=None)
    assert (directory.name, is_new) == ("pair", True)
    assert take(cluster_file, runs, name=None, nodes=None) == (directory, hosts, False)
    assert calls() == ["acquire kept-pair"]
    spec = read_cluster(str(directory / "cluster.yaml"))
    assert (spec.provider, [node.host for node in spec.named]) == ("ssh", ["127.0.0.1", "127.0.0.2"])
    (one,) = list_taken(runs)
    give_back(one)
    give_back(one)
    assert calls() == ["acquire kept-pair", "release kept-pair"]
    assert list_taken(runs) == []
    assert not directory.exists()  # nor is its lock left


def test_hosts_that_are_gone_are_taken_anew(runs, cluster_file, calls):
    take(cluster_file, runs, name=None, nodes=None)
    next((runs / "_clusters" / "allocations").glob("*/127.0.0.2")).unlink()
    assert take(cluster_file, runs, name=None, nodes=None)[2]
    assert calls() == ["acquire kept-pair", "release kept-pair", "acquire kept-pair"]


def test_another_cluster_of_the_name_is_refused(runs, cluster_file):
    take(cluster_file, runs, name=None, nodes=None)
    with pytest.raises(ConfigError, match=r"pair: is held with other values.*cherry cluster down pair"):
        take(cluster_file, runs, name=None, nodes=1)
    take(cluster_file, runs, name="other", nodes=1)
    assert [one.name for one in list_taken(runs)] == ["other", "pair"]


def test_what_was_taken_before_a_failure_is_given_back(runs, cluster_file, calls):
    path = Path(cluster_file)
    path.write_text(path.read_text().replace("127.0.0.2", "node7.invalid"))
    with pytest.raises(OperationalError, match=r"node7\.invalid"):
        take(cluster_file, runs, name=None, nodes=None)
    assert calls() == ["acquire kept-pair", "release kept-pair"]
    assert list_taken(runs) == []
    assert not (runs / "_clusters" / "pair").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"name": "a/b"}, "--name: must be"), ({"nodes": 3}, "from 1 to 2"), ({"nodes": 0}, r"\(got 0\)")],
)
def test_wrong_values_are_refused_before_anything_is_written(runs, cluster_file, changes, match):
    with pytest.raises(ConfigError, match=match):
        take(cluster_file, runs, **{"name": None, "nodes": None, **changes})
    with pytest.raises(MissingFileError):
        take("no-such.yaml", runs, name=None, nodes=None)
    assert not runs.exists()
