"""Measures how fast a large checkpoint is quantized, beside a plain copy of the same bytes, and in how much memory.

    python -m benchmarks.quantize_folder [--gib 40] [--format NAME] [--workers N] [--folder DIR] [--output FILE]

The checkpoint has the names, shapes and shards of DeepSeek-V3's MoE layers in bf16, as many as asked for. It is made by
copying: each shard's data are bytes of one file of random weights, read from the disk and written under a header of the
shard's own, by as many threads as there are workers; that is the copy that is measured. Then `python -m model.quantize`
quantizes the folder. A source shard is deleted when it and all before it are finished, so the disk holds the source
once and the target as it grows. Files are dropped from the page cache before they are read and synced after they are
written, on both sides. Memory is the sum of the resident memory of the program and its workers, sampled; mapped files
and what processes share count in each.

One JSON row, with null for what other programs measure: gb_s_read is bytes of the source a second from the program's
start to its end, start-up included, copy_gb_s the same of the copy, gb_s_written bytes of the target.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from model.model_config import PRESETS, ModelConfig
from model.numerics.formats import DEFAULT_FORMAT, FORMATS
from model.quantization.workers import available_cores
from model.weights.hf_config import hf_config

GIB = 1 << 30
SHARD_BYTES = 2 * GIB
# Random weights are made once and repeated: what is rounded does not depend on what stands elsewhere.
RANDOM_BYTES = 256 << 20
STD = 0.006
SAMPLE_SECONDS = 0.2
Weights = dict[str, tuple[str, list[int]]]
"""Safetensors type and shape by released name."""


def layer_weights(layer: int, config: ModelConfig) -> Weights:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    q_rank = config.q_lora_rank or 0
    attention = {
        "q_a_proj": [q_rank, hidden],
        "q_b_proj": [queries, q_rank],
        "kv_a_proj_with_mqa": [rank + config.qk_rope_head_dim, hidden],
        "kv_b_proj": [heads * (config.qk_nope_head_dim + config.v_head_dim), rank],
        "o_proj": [hidden, heads * config.v_head_dim],
        "q_a_layernorm": [q_rank],
        "kv_a_layernorm": [rank],
    }
    names = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    names |= {"input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden]}
    names["mlp.gate.weight"] = [config.n_routed_experts, hidden]
    for owner in ["shared_experts", *(f"experts.{expert}" for expert in range(config.n_routed_experts))]:
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = [config.moe_intermediate_size, hidden]
            names[f"mlp.{owner}.{name}.weight"] = shape[::-1] if name == "down_proj" else shape
    weights: Weights = {f"model.layers.{layer}.{name}": ("BF16", shape) for name, shape in names.items()}
    weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = ("F32", [config.n_routed_experts])
    return weights


def size_of(kind: str, shape: list[int]) -> int:
    return math.prod(shape) * (4 if kind == "F32" else 2)


def shards_of(config: ModelConfig, total: int) -> Iterator[Weights]:
    """Weights of each shard, until there are `total` bytes."""
    shard: Weights = {}
    room, layer = min(SHARD_BYTES, total), config.first_k_dense_replace
    while True:
        for name, (kind, shape) in layer_weights(layer, config).items():
            size = size_of(kind, shape)
            if shard and size > room:
                yield shard
                total -= sum(size_of(*one) for one in shard.values())
                if total < size:
                    return
                shard, room = {}, min(SHARD_BYTES, total)
            shard[name] = (kind, shape)
            room -= size
        layer += 1


def make_pool(path: Path, size: int) -> None:
    count = min(RANDOM_BYTES, size) // 2
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul_(STD).bfloat16()
    data = values.view(torch.uint8).numpy()
    with path.open("wb") as handle:
        while handle.tell() < size:
            handle.write(data)
        os.fsync(handle.fileno())


def copy_shard(pool: Path, target: Path, weights: Weights) -> int:
    """Bytes of a shard that was made by copying data from `pool`, and is on the disk and out of the page cache."""
    entries, size = {}, 0
    for name, (kind, shape) in weights.items():
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [size, size + size_of(kind, shape)]}
        size += size_of(kind, shape)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with pool.open("rb") as reading, target.open("wb", buffering=0) as writing:
        os.posix_fadvise(reading.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        writing.write(len(header).to_bytes(8, "little") + header)
        place = 0
        while place < size:
            place += os.sendfile(writing.fileno(), reading.fileno(), place, size - place)
        os.fsync(writing.fileno())
        os.posix_fadvise(writing.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return writing.tell()


def make_source(folder: Path, total: int, threads: int) -> tuple[int, float]:
    """Bytes of the checkpoint, and the seconds in which they were copied."""
    config = ModelConfig(**PRESETS["671b"])
    folder.mkdir()
    pool = folder.parent / "pool"
    shards = list(shards_of(config, total))
    make_pool(pool, max(sum(size_of(*one) for one in weights.values()) for weights in shards))
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": weights for i, weights in enumerate(shards, start=1)}
    started = time.monotonic()
    with ThreadPoolExecutor(threads) as copying:
        sizes = list(copying.map(lambda item: copy_shard(pool, folder / item[0], item[1]), files.items()))
    seconds = time.monotonic() - started
    pool.unlink()
    index = {name: file for file, weights in files.items() for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    return sum(sizes), seconds


class Watch:
    """While the program runs: its memory is sampled, and source shards that it has finished are deleted."""

    def __init__(self, process: subprocess.Popen, source: Path, target: Path) -> None:
        self.peak_bytes = 0
        self._process, self._target = psutil.Process(process.pid), target
        self._files = sorted(source.glob("*.safetensors"))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            try:
                tree = [self._process, *self._process.children()]
                self.peak_bytes = max(self.peak_bytes, sum(one.memory_info().rss for one in tree))
            except psutil.NoSuchProcess:
                continue
            # A group's members may stand in a later file than the one that it is written to.
            while self._files and (self._target / "manifest" / f"{self._files[0].name}.json").exists():
                self._files.pop(0).unlink()


def quantize(source: Path, target: Path, options: argparse.Namespace) -> tuple[float, int]:
    """Seconds that the program took, and the most resident memory of its processes in bytes."""
    command = [sys.executable, "-m", "model.quantize", "--source", str(source), "--target", str(target)]
    command += ["--format", options.format, "--workers", str(options.workers)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    with Watch(process, source, target) as watch:
        code = process.wait()
    if code:
        raise SystemExit(code)
    return time.monotonic() - started, watch.peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=40.0, help="size of the checkpoint")
    parser.add_argument("--format", choices=list(FORMATS), default=DEFAULT_FORMAT)
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--folder", type=Path, help="disk to measure (default: the one of temporary files)")
    parser.add_argument("--output", type=Path, help="append the row to this JSON array too")
    options = parser.parse_args()
    total = int(options.gib * GIB)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantize-", dir=options.folder) as scratch:
        free = shutil.disk_usage(scratch).free
        if free < total * 1.1 + 2 * SHARD_BYTES:
            parser.error(f"--gib: {scratch} has {free / GIB:.0f} GiB free, a tenth more than the checkpoint is needed")
        source, target = Path(scratch, "source"), Path(scratch, "target")
        size, copy_s = make_source(source, total, options.workers)
        seconds, peak = quantize(source, target, options)
        report = json.loads((target / "quantization.json").read_text())
        written = sum(state["bytes"] for state in report["shards"].values())
    row = {
        "format": options.format,
        "method": "rounded to nearest",
        "model": f"MoE layers of 671b, random, {size / GIB:.1f} GiB",
        "bytes_ratio": round(report["ratio"], 4),
        **dict.fromkeys(("dnll", "dnll_upper", "kl", "top1")),
        "gb_s_read": round(size / seconds / 1e9, 3),
        "gb_s_written": round(written / seconds / 1e9, 3),
        "copy_gb_s": round(size / copy_s / 1e9, 3),
        "peak_rss_gib": round(peak / GIB, 2),
        "workers": options.workers,
        "rel_error": round(report["mean_rel_error"], 5),
        "date": date.today().isoformat(),
        "device": f"CPU, {available_cores()} cores",
        "versions": {"torch": version("torch"), "python": sys.version.split()[0]},
        "command": f"python -m benchmarks.quantize_folder --gib {options.gib:g} --format {options.format} "
        f"--workers {options.workers}",
    }
    print(json.dumps(row), flush=True)
    if options.output:
        rows = [*(json.loads(options.output.read_text()) if options.output.exists() else []), row]
        options.output.write_text("[\n" + ",\n".join(json.dumps(one) for one in rows) + "\n]\n")


if __name__ == "__main__":
    main()
