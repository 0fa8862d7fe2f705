"""Providers by name: the built-in one, one of an installed package, and the sentence for one that is not installed."""

import pytest

from base.errors import ConfigError
from cherry.cluster import ClusterSpec
from tasks.providers.local import LocalProvider
from tasks.providers.registry import find_provider, known_providers, lifetime_s, provider_name, reserve


def test_a_package_adds_a_provider_by_its_entry_point(two_hosts):
    assert known_providers() == ["local", "slurm", "ssh", "two-hosts"]
    assert isinstance(find_provider("local"), LocalProvider)
    assert type(find_provider("two-hosts")).__name__ == "TwoHosts"
    spec = ClusterSpec(kind="nodes", provider="two-hosts", gpu="H100")
    assert provider_name("spec.yaml", spec) == "two-hosts"
    assert provider_name("local", ClusterSpec(kind="local")) == "local"


def test_hosts_are_held_as_long_as_their_file_says_or_as_their_provider_is_lent():
    local, named = ClusterSpec(kind="local"), ClusterSpec(nodes=({"host": "a"},))
    asked = reserve("local", local, "runs/a", "a-0", nodes=1, ranks_per_node=1)
    assert asked.until - asked.since == pytest.approx(30 * 86_400)
    assert lifetime_s("ssh", named) == 30 * 86_400
    assert lifetime_s("slurm", named) == 30 * 86_400
    assert lifetime_s("two-hosts", named) == 86_400
    assert lifetime_s("slurm", ClusterSpec(gpu="H100", max_lifetime="36h")) == 36 * 3600


def test_hosts_by_skypilot_are_not_taken_and_it_is_told_how_to_submit():
    with pytest.raises(ConfigError, match=r"cluster: sky\.yaml: no run submits to provider sky.*sky jobs launch task"):
        provider_name("sky.yaml", ClusterSpec(provider="sky"))


def test_without_the_package_there_is_no_such_provider():
    with pytest.raises(ConfigError, match="no provider 'two-hosts' is installed; known are local, slurm, ssh"):
        find_provider("two-hosts")
