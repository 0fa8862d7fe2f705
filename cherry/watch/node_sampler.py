"""What a node uses: processors, memory, network, disk and GPUs, sampled by its launcher while a job runs.

The samples of a node lie in `train/nodes/<node>.jsonl` of the run directory, which all hosts of a job share, or whose
files are carried (cherry/remote/carry.py): no host but the flow's has to reach the tracker. Names of figures are those
of MLflow's system metrics, where it has them.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from base.json_lines import append_json, as_record, read_last

NODES_FOLDER = "nodes"
"""Folder in `train/` of the run directory."""
SAMPLE_S = 5.0
"""Seconds between two samples."""
_FIRST_S = 1.0  # a short job has a sample too
_MEGABYTE = 1e6
# Some days of a node with 8 GPUs, in this file and the part before it.
_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class NodeSample:
    """What a node used at a time."""

    node: str
    number: int
    """Samples of the node so far, this one too."""
    time: float
    """Unix time."""
    figures: dict[str, float]
    """By the names of MLflow's system metrics, where it has them."""


class NodeSampler:
    """Samples of this node. Rates are means since the sample before."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()
        self._gpus = _Gpus()
        self._at = time.monotonic()
        self._counted = _counters()
        psutil.cpu_percent()  # the first call has nothing to compare with

    def sample(self) -> dict[str, float]:
        """Figures by name; what the system does not tell is left out."""
        memory, now, counted = psutil.virtual_memory(), time.monotonic(), _counters()
        passed, before = max(now - self._at, 1e-3), self._counted
        self._at, self._counted = now, counted
        figures = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": (memory.total - memory.available) / _MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            **{f"{name}_megabytes_per_second": each / passed / _MEGABYTE for name, each in _passed(before, counted)},
            **self._gpus.sample(),
        }
        place = next(one for one in (self._directory, *self._directory.parents) if one.exists())
        disk = psutil.disk_usage(str(place))
        figures["disk_usage_percentage"] = disk.percent
        figures["disk_available_megabytes"] = disk.free / _MEGABYTE
        return {name: round(value, 3) for name, value in figures.items()}


def _counters() -> dict[tuple[str, str], int]:
    """Bytes so far by kind and device: of network interfaces, but for the loopback one, and of all disks."""
    found: dict[tuple[str, str], int] = {}
    for name, link in psutil.net_io_counters(pernic=True).items():
        if name != "lo":
            found |= {("network_receive", name): link.bytes_recv, ("network_transmit", name): link.bytes_sent}
    disks = psutil.disk_io_counters()
    if disks is not None:  # a container may not see them
        found |= {("disk_read", ""): disks.read_bytes, ("disk_write", ""): disks.write_bytes}
    return found


def _passed(before: Mapping[tuple[str, str], int], counted: Mapping[tuple[str, str], int]) -> Iterator[tuple[str, int]]:
    """(kind, bytes since) in all; a device that came or went meanwhile, or counts anew, adds nothing."""
    for wanted in dict.fromkeys(kind for kind, _ in counted):
        since = (value - before.get(key, value) for key, value in counted.items() if key[0] == wanted)
        yield wanted, sum(max(0, each) for each in since)


class _Gpus:
    """The GPUs that a job may use, by NVML; none where its library or a driver is not there."""

    def __init__(self) -> None:
        self._handles: dict[int, Any] = {}
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml: Any = pynvml
            count = pynvml.nvmlDeviceGetCount()
            self._handles = {index: pynvml.nvmlDeviceGetHandleByIndex(index) for index in _visible(count)}
        except Exception:  # no library, no driver, or one that fails: there is nothing to sample
            self._handles = {}

    def sample(self) -> dict[str, float]:
        """Figures of each GPU by name, like `gpu_0_power_usage_watts`; what it does not tell is left out."""
        return {f"gpu_{index}_{name}": value for index, gpu in self._handles.items() for name, value in self._of(gpu)}

    def _of(self, gpu: Any) -> Iterator[tuple[str, float]]:
        nvml = self._nvml
        reads: dict[str, Callable[[], float]] = {
            "utilization_percentage": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            "memory_usage_megabytes": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used / _MEGABYTE,
            "memory_total_megabytes": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).total / _MEGABYTE,
            "power_usage_watts": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000.0,
            "temperature_celsius": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        }
        for name, read in reads.items():
            with suppress(nvml.NVMLError):
                yield name, float(read())


def _visible(count: int) -> list[int]:
    """GPUs that CUDA_VISIBLE_DEVICES leaves of so many; all of them where it names none by number."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not re.fullmatch(r"\d+(,\d+)*", named):
        return list(range(count))
    return [index for index in map(int, named.split(",")) if index < count]


def node_file(directory: Path, node: str) -> Path:
    """The samples of a node, where `directory` is `train/` of the run directory."""
    return directory / NODES_FOLDER / f"{node}.jsonl"


def sample_node(directory: Path, *, every_s: float = SAMPLE_S) -> None:
    """Append this node's samples to its file by a thread, until the process ends.

    Args:
        directory: `train/` of the run directory.
        every_s: seconds between two samples.
    """
    threading.Thread(target=_sample, args=(directory, every_s), name="node-sampler", daemon=True).start()


def _sample(directory: Path, every_s: float) -> None:
    node = socket.gethostname()
    path, sampler = node_file(directory, node), NodeSampler(directory)
    last = _last(path)
    number = 0 if last is None else last.number
    pause_s = min(every_s, _FIRST_S)
    while True:
        time.sleep(pause_s)
        pause_s = every_s
        number += 1
        with suppress(OSError, psutil.Error):  # a figure that the system fails to tell now; it may later
            figures = sampler.sample()
            append_json(path, asdict(NodeSample(node, number, time.time(), figures)), most_bytes=_FILE_BYTES)


def read_nodes(directory: Path) -> dict[str, NodeSample]:
    """The newest sample of each node, by its name; `directory` is `train/` of the run directory."""
    paths = sorted((directory / NODES_FOLDER).glob("*.jsonl"))
    found = {path.stem: _last(path) for path in paths}
    return {node: sample for node, sample in found.items() if sample is not None}


def read_samples(lines: Iterable[Mapping[str, Any]]) -> list[NodeSample]:
    """The samples that lines of a node's file hold; damaged ones are left out."""
    return [sample for line in lines if (sample := as_record(NodeSample, line)) is not None]


def _last(path: Path) -> NodeSample | None:
    found = read_last(path, "figures", accept=lambda line: as_record(NodeSample, line) is not None)
    return None if found is None else as_record(NodeSample, found)
