"""Cluster specs: the shipped files, this machine, and specs that break a rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.config import validate
from base.errors import ConfigError, MissingFileError
from cherry.cluster import ClusterSpec, read_cluster
from cherry.hardware import GPUS

CLUSTERS = Path(__file__).resolve().parents[2] / "configs" / "clusters"


@pytest.mark.parametrize(
    ("spec", "problem"),
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
def test_a_spec_that_breaks_a_rule_is_refused_with_its_key(spec: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(spec, ClusterSpec, origin="spec.yaml")
    assert f"spec.yaml: 1 problem\n  {problem}" in str(caught.value)


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_spec_is_what_its_file_s_name_says(path: Path) -> None:
    spec = read_cluster(str(path))
    gpu, _, gpus = path.stem.partition("-")
    if not gpus:
        assert (spec.kind, spec.gpus) == ("local", 1)
    else:
        assert (spec.kind, spec.hardware, spec.gpus) == ("nodes", gpu.upper(), int(gpus))
    assert spec.hardware in GPUS


def test_local_is_this_machine() -> None:
    assert read_cluster("local") == ClusterSpec(kind="local")
    assert ClusterSpec(kind="local").hardware == "laptop"
    with pytest.raises(MissingFileError, match=r"elsewhere\.yaml"):
        read_cluster("elsewhere.yaml")
