"""Cluster specs: the shipped files, this machine, and specs that break a rule."""

from __future__ import annotations

import pytest

from base.config import validate
from base.errors import ConfigError
from cherry.cluster import ClusterSpec


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (
            {"kind": "nodes", "gpu": "H1000", "nodes": 2},
            "gpu: unknown hardware; known are H100, ",
        ),
        ({"kind": "nodes", "nodes": 2}, "gpu: is required with kind nodes"),
        ({"kind": "nodes", "gpu": "H100", "price_per_gpu_hour": -1.0}, "price_per_gpu_hour: input should be greater"),
        (
            {"kind": "nodes", "provider": "p", "gpu": "H100", "nodes": 2, "hosts": ["a", "a"]},
            "hosts: each host must be named once",
        ),
        (
            {"kind": "nodes", "provider": "p", "gpu": "H100", "nodes": 2, "hosts": ["a"]},
            "hosts: must name all of the 2 nodes or none",
        ),
        ({"kind": "local", "nodes": 2}, "nodes: must be 1 with kind local"),
        ({"kind": "nodes", "gpu": "H100", "assumed_imbalance": 0.5}, "assumed_imbalance: input should be greater"),
    ],
)
def test_a_wrong_cluster_is_a_sentence(spec: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(spec, ClusterSpec, origin="spec.yaml")
    assert f"spec.yaml: 1 problem\n  {told}" in str(caught.value)
