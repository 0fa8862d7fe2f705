"""`cherry-launch --cluster`: starts a job on the hosts of a cluster file over ssh, or submits it to Slurm."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from base.errors import ConfigError, run_program
from base.lost_output import outlive_output
from cherry.cluster import SKY, SKY_IS_RENDERED, SLURM, read_cluster
from cherry.remote.job import build_parser, parse_job


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a job to its end, and exit with the code of the error that ended it."""
    outlive_output()
    raise SystemExit(run_program(lambda: _launch(sys.argv[1:] if arguments is None else arguments)))


def _launch(arguments: Sequence[str]) -> None:
    cluster = build_parser().parse_args(arguments).cluster
    provider = read_cluster(cluster).provider
    if provider == SKY:
        raise ConfigError(f"{cluster}: {SKY_IS_RENDERED}")
    if provider == SLURM:
        from cherry.slurm.submit import launch

        launch(arguments)
    else:
        from cherry.remote.supervisor import supervise

        supervise(parse_job(arguments))
