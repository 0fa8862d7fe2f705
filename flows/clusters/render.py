"""The job of a run as the system that starts it gets it: a Slurm script, or a SkyPilot task."""

from __future__ import annotations

from base.errors import ConfigError
from cherry.cluster import SKY, SLURM, read_cluster
from cherry.sky import parser, task_file
from tasks.overrides import run_directory
from tasks.providers.registry import reservation_of
from tasks.providers.slurm import example_arguments, script_of
from tasks.run_config import RunConfig


def rendered(config: RunConfig) -> str:
    """Text of the sbatch script that a run would submit, but for the end of its job's name, which a run makes up; or of
    the task for `sky jobs launch`, checked by SkyPilot's parser where the cluster file names it.

    Raises:
        ConfigError: nothing is rendered for the provider of the config's cluster, a path does not fit in a script, or
            the job does not fit SkyPilot's hosts.
    """
    directory, spec = run_directory(config), read_cluster(config.cluster)
    if spec.provider == SKY:
        task = task_file.render(config, spec, origin=config.cluster)
        if spec.sky.client is not None:
            parser.check(task, spec.sky.client)
        return task
    reservation = reservation_of(config, spec, directory, config.name)
    if reservation.provider != SLURM:
        raise ConfigError(
            f"cluster: {config.cluster} has provider {reservation.provider}, which starts the job by itself: there is "
            f"nothing to render. Give a cluster file with provider {SLURM} or {SKY}, like "
            "cluster=configs/clusters/slurm.yaml."
        )
    return script_of(reservation, example_arguments(directory))
