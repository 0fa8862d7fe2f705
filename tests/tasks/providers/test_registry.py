"""Providers by name: the built-in one, one of an installed package, and the sentence for one that is not installed."""

import pytest

from base.errors import ConfigError
from cherry.cluster import ClusterSpec
from tasks.providers.local import LocalProvider
from tasks.providers.registry import find_provider, known_providers, provider_name


def test_a_package_adds_a_provider_by_its_entry_point(two_hosts):
    assert known_providers() == ["local", "two-hosts"]
    assert isinstance(find_provider("local"), LocalProvider)
    assert type(find_provider("two-hosts")).__name__ == "TwoHosts"
    spec = ClusterSpec(kind="nodes", provider="two-hosts", gpu="H100")
    assert provider_name("spec.yaml", spec) == "two-hosts"
    assert provider_name("local", ClusterSpec(kind="local")) == "local"


def test_without_the_package_there_is_no_such_provider():
    with pytest.raises(ConfigError, match="no provider 'two-hosts' is installed; known are local"):
        find_provider("two-hosts")
