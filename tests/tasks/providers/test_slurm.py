"""The Slurm provider: what it checks before anything is submitted, its command, and the release by the job's name."""

from __future__ import annotations

import pytest

from base.errors import ConfigError
from cherry.cluster import ClusterSpec, SlurmConfig, read_cluster
from cherry.slurm import commands
from tasks.providers.protocol import Reservation, write_reservation
from tasks.providers.slurm import SlurmProvider
from tests.slurm import slurm_lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """node1 and node2."""
    yield from slurm_lab(tmp_path_factory.mktemp("lab"), 2)


def reservation(tmp_path, *, nodes=2, ranks=1, gpus_per_node=None, **options):
    spec = ClusterSpec(provider="slurm", nodes=3, gpus_per_node=gpus_per_node, slurm=SlurmConfig(**options))
    made = Reservation(
        provider="slurm",
        cluster="slurm.yaml",
        spec=spec,
        name="run-1a2b3c4d",
        run_directory=str(tmp_path),
        nodes=nodes,
        ranks_per_node=ranks,
        master_port=None,
        memory_bytes_per_node=0,
    )
    write_reservation(tmp_path, made)
    return made


def test_more_than_the_file_has_is_refused_before_slurm_is_asked(tmp_path):
    with pytest.raises(ConfigError, match=r"launch\.nnodes: cluster 'slurm\.yaml' has 3 nodes \(got 4\)"):
        SlurmProvider().check(reservation(tmp_path, nodes=4))
    with pytest.raises(ConfigError, match=r"launch\.nproc_per_node: .* has 2 GPUs a node \(got 3\)"):
        SlurmProvider().check(reservation(tmp_path, ranks=3, gpus_per_node=2))


def test_a_machine_without_slurm_is_told_where_to_start(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no sbatch, squeue, scontrol, scancel on this machine.* login node"):
        SlurmProvider().check(reservation(tmp_path))


@pytest.mark.slow
def test_a_job_that_slurm_would_refuse_is_refused_and_one_that_it_takes_is_cancelled_by_its_name(
    lab, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_CONF", str(lab.conf))
    provider, asked = SlurmProvider(), reservation(tmp_path)
    provider.check(asked)
    with pytest.raises(ConfigError, match=r"sbatch refuses: .*partition"):
        provider.check(reservation(tmp_path, partition="none"))
    with pytest.raises(ConfigError, match=r"sbatch refuses: .*not available"):
        provider.check(reservation(tmp_path, nodes=3))
    provider.check(reservation(tmp_path, ranks=2, gpus_per_node=2))
    with pytest.raises(ConfigError, match=r"sbatch refuses: .*not available"):
        provider.check(reservation(tmp_path, ranks=3, gpus_per_node=8))
    assert commands.jobs_named(asked.name) == []
    write_reservation(tmp_path, asked)
    held = provider.acquire(asked)
    assert provider.is_alive(held)
    (command,) = provider.commands(held, ["-m", "cherry.rank_main", "--config", "c.yaml"])
    assert command[2:4] == ["-m", "cherry.slurm.submit"]
    assert read_cluster(command[4].removeprefix("--cluster=")) == asked.spec
    assert command[5:] == [
        *("--name=run-1a2b3c4d", "--nnodes=2", "--nproc_per_node=1", "-m", "cherry.rank_main", "--config", "c.yaml"),
    ]
    commands.submit(f"#!/bin/bash\n#SBATCH --job-name={asked.name} --output=/dev/null\nsleep 600\n")
    provider.release(asked)
    lab.until(lambda: commands.jobs_named(asked.name) == [], "the job is gone")
    provider.release(asked)
    (tmp_path / "reservation.json").unlink()
    assert not provider.is_alive(held)
    with pytest.raises(ConfigError, match="were released"):
        provider.commands(held, [])
