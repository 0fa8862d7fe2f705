"""Format that a run's weights are quantized in, with the reason, and the one to try where it costs too much."""

from __future__ import annotations

from typing import NamedTuple

from cherry.cluster import read_cluster
from cherry.hardware import GPUS, find_gpu
from cherry.planner.local_device import local_gpus
from model.calibration.names import BEST, NEAREST, misfit
from model.numerics.formats import AUTO, DEFAULT_FORMAT, FORMATS, natural_format
from tasks.run_config import RunConfig

OUTPUT = "quantized"
"""Name and folder of the quantize step's output in the run's own format."""


class Chosen(NamedTuple):
    """A format of the registry, and a sentence on why it is taken."""

    name: str
    reason: str


def chosen_format(config: RunConfig) -> Chosen:
    """Format of a run: the configured one, or for `auto` the one that suits the GPU that serves the weights.

    Raises:
        MissingFileError, ConfigError: see `cherry.cluster.read_cluster`.
    """
    if config.quantize.format != AUTO:
        return Chosen(config.quantize.format, "as quantize.format says")
    origin, name = _serving_gpu(config)
    gpu = None if name is None else GPUS.get(name) or find_gpu(name)
    if name is None or gpu is None or gpu.compute_capability is None:
        found = "no GPU" if name is None else f"{name}, whose tensor cores are not listed"
        return Chosen(DEFAULT_FORMAT, f"auto: {origin} is {found}, and {DEFAULT_FORMAT} runs anywhere")
    chosen = natural_format(gpu.compute_capability)
    while FORMATS[chosen].misfit(config.model) is not None:
        chosen = FORMATS[chosen].milder or DEFAULT_FORMAT
    major, minor = gpu.compute_capability
    return Chosen(
        chosen,
        f"auto: {origin} is {name}, whose tensor cores (compute capability {major}.{minor}) multiply its numbers: "
        f"{FORMATS[chosen].description}",
    )


def compared_formats(config: RunConfig) -> list[str]:
    """Formats of `quantize.compare` that fit the model's sizes and are not the run's own."""
    own = chosen_format(config).name
    return [name for name in config.quantize.compare if name != own and FORMATS[name].misfit(config.model) is None]


def output_of(format_name: str) -> str:
    """Name and folder of the output in a format of `quantize.compare`."""
    return f"{OUTPUT}-{format_name}"


def next_milder(config: RunConfig) -> str | None:
    """The format to propose where the run's costs too much; `None` where there is none.

    Raises:
        MissingFileError, ConfigError: see `cherry.cluster.read_cluster`.
    """
    return config.quantize.fallback or FORMATS[chosen_format(config).name].milder


def closer_method(config: RunConfig) -> str | None:
    """The method to propose where the run's format costs too much by plain rounding; `None` where there is none.

    Raises:
        MissingFileError, ConfigError: see `cherry.cluster.read_cluster`.
    """
    nearest = config.quantize.method == NEAREST
    return BEST if nearest and misfit(BEST, chosen_format(config).name) is None else None


def _serving_gpu(config: RunConfig) -> tuple[str, str | None]:
    """(where it is told, name) of the GPU that serves the weights; the name is `None` for a CPU."""
    if config.quantize.gpu is not None:
        return "quantize.gpu", config.quantize.gpu
    spec = read_cluster(config.cluster)
    if spec.gpu is not None:
        return f"the GPU of {config.cluster}", spec.gpu
    return "this machine's device", next(iter(local_gpus()), None)
