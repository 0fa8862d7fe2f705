"""The environment of a run, for the tracker: who, where, with which packages, on which device, and what it costs."""

from __future__ import annotations

import functools
import getpass
import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version

from cherry.cluster import LOCAL, read_cluster
from cherry.planner.local_device import local_gpus
from tasks.records.figures import cost_of, name_of
from tasks.run_config import RunConfig

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "accelerate", "prefect", "mlflow", "numpy")
_S_PER_HOUR = 3600.0


def user_name() -> str:
    """Name of the user, or the number of one that has no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the latter from Python 3.13 on
        return str(os.getuid())


@functools.cache
def environment_tags() -> dict[str, str]:
    """Host, Python and versions of the packages that decide a run's numbers, as tags of a run."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {"host": socket.gethostname(), "python": platform.python_version(), "packages": ", ".join(found)}


def device_of(config: RunConfig) -> str:
    """Devices that a run trains on, by number and name, like `32 x H100`, or this machine's CPU.

    Raises:
        MissingFileError, ConfigError: see `cherry.cluster.read_cluster`.
    """
    spec = read_cluster(config.cluster)
    if spec.kind != LOCAL:
        return f"{_gpus(config)} x {spec.gpu or 'GPU'}" if _gpus(config) else f"{config.launch.nnodes} hosts"
    names = local_gpus()
    if names:
        return f"{_gpus(config)} x {names[0]}"
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def cost_figures(config: RunConfig, seconds: float) -> dict[str, float]:
    """GPU hours, and their price where the cluster file has one, by name in the tracker; empty without GPUs.

    Args:
        seconds: for which the run's hosts were held.
    """
    spec, gpus = read_cluster(config.cluster), _gpus(config)
    if not gpus:
        return {}
    hours = gpus * seconds / _S_PER_HOUR
    price = spec.price_per_gpu_hour
    return {name_of("gpu_hours", "flow"): hours} | ({} if price is None else {cost_of(spec.currency): price * hours})


def _gpus(config: RunConfig) -> int:
    """GPUs that a run holds: those of whole nodes of a cluster, and of this machine those that it trains on."""
    spec = read_cluster(config.cluster)
    if spec.kind != LOCAL:
        return config.launch.nnodes * spec.node_gpus if spec.has_gpus else 0
    return min(len(local_gpus()), config.launch.nproc_per_node)
