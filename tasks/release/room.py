"""Room for a replica: the memory that it needs at least, compared with what is free, before it is started."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from typing import Any

import psutil

from anything.router.kinds import DEFAULT_KIND
from anything.serve_config import EngineConfig
from base import storage
from base.errors import CherryError, OperationalError
from cherry.hardware import GIB, PROCESS_BYTES
from cherry.planner.local_device import local_gpus
from tasks.processes.replicas import GATEWAY, ServingDirectory
from tasks.release.choice import Release
from tasks.run_config import RunConfig

_FLOATS = {"F64", "F32", "F16", "BF16"}
# Bytes of a value in the engine, by the engine's type of floats.
_FLOAT_BYTES = {"float32": 4, "bfloat16": 2}
_MIB = 2**20


def check_room(config: RunConfig, release: Release) -> None:
    """Check that a replica of the release fits beside what runs; one that runs already needs no more.

    Only the embedded engine's need is known, and it is a lower bound: without the activations of requests.

    Raises:
        OperationalError: too little is free now; the text has the figures.
    """
    serving, engine = ServingDirectory(config.runs_directory), config.serve.engine
    kind = config.deploy.replica_kind
    if kind != DEFAULT_KIND or serving.find_replica(release.label, release.model_path, kind) is not None:
        return
    on_gpu = engine.device == "cuda" or (engine.device == "auto" and bool(local_gpus()))
    free = _free_gpu_bytes() if on_gpu else psutil.virtual_memory().available
    float_bytes = _FLOAT_BYTES.get(engine.dtype, 2 if on_gpu else 4)
    try:
        weights = weights_bytes(release.model_path, float_bytes)
        cache = _cache_bytes(storage.read_json(storage.join(release.model_path, "config.json")), engine, float_bytes)
    except (CherryError, ValueError, KeyError, TypeError):
        return  # the replica tells what is wrong with its weights
    parts = {"of weights": weights, "of cache": cache, "for the process": PROCESS_BYTES}
    if free is None or (needed := sum(parts.values())) <= free:
        return
    others = [server.name for server in serving.servers() if server.alive and server.name != GATEWAY]
    beside = f" beside {', '.join(others)}" if others else ""
    stop = "stop what is served (`cherry stop`; requests fail until the release has ended), " if others else ""
    listed = ", ".join(f"{_gib(size)} {what}" for what, size in parts.items())
    raise OperationalError(
        f"memory: a replica of {release.label} needs at least {_gib(needed)} ({listed}), and {_gib(free)} are free "
        f"{'on the GPU' if on_gpu else 'here'}{beside}. Free some, {stop}or lower serve.engine.cache_blocks. Nothing "
        "was started."
    )


def weights_bytes(uri: str, float_bytes: int) -> int:
    """Bytes of a safetensors folder's weights in an engine whose floats have `float_bytes`; what is quantized stays so.

    Raises:
        CherryError, ValueError, KeyError: the folder's files cannot be read.
    """
    total = 0
    for file in storage.find(uri):
        if not file.name.endswith(".safetensors"):
            continue
        with storage.open_read(file.uri) as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                floats = entry["dtype"] in _FLOATS
                total += math.prod(entry["shape"]) * float_bytes if floats else end - begin
    return total


def _cache_bytes(model: dict[str, Any], engine: EngineConfig, float_bytes: int) -> int:
    """Bytes of the latent cache: a latent and a rotated key of each token and layer."""
    tokens = engine.cache_blocks * engine.block_tokens
    width = int(model["kv_lora_rank"]) + int(model["qk_rope_head_dim"])
    return int(model["num_hidden_layers"]) * tokens * width * float_bytes


def _free_gpu_bytes() -> int | None:
    """Free memory of the GPU that has most; `None` when the driver's tool does not tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return max(int(line) for line in answer.stdout.split()) * _MIB
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
