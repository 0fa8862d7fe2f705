"""The job that a run would submit, before it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.config import load
from base.errors import ConfigError
from flows.clusters.render import rendered
from tasks.run_config import RunConfig

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def config(cluster, tmp_path, *overrides):
    chosen = [f"cluster={cluster}", f"runs_directory={tmp_path}", *overrides]
    return load(CONFIGS / "tiny.yaml", RunConfig, chosen)


def test_a_runs_script_is_shown_and_nothing_is_written(tmp_path):
    text = rendered(config(CONFIGS / "clusters" / "slurm.yaml", tmp_path, "launch.nnodes=2", "launch.nproc_per_node=2"))
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n")
    assert "--nnodes=2 --nproc_per_node=2 " in text
    assert f"-m cherry.rank_main --config {tmp_path}/tiny/config.yaml --run_dir {tmp_path}/tiny &" in text
    assert list(tmp_path.iterdir()) == []


def test_a_task_for_skypilot_is_shown_and_the_environment_of_its_parser_is_checked(tmp_path):
    cluster = tmp_path / "sky.yaml"
    cluster.write_text("provider: sky\n")
    place = "checkpoint.directory=s3://bucket/tiny"
    assert "\nnum_nodes: 1\n" in rendered(config(cluster, tmp_path, place))
    cluster.write_text("provider: sky\nsky: {client: /nowhere/python}\n")
    with pytest.raises(ConfigError, match=r"sky\.client: /nowhere/python does not start"):
        rendered(config(cluster, tmp_path, place))


def test_a_cluster_that_submits_nothing_has_nothing_to_show(tmp_path):
    with pytest.raises(ConfigError, match=r"cluster: local has provider local, .* nothing to render"):
        rendered(config("local", tmp_path))
