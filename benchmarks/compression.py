"""Measures what compressed gradient reduction saves on the wire and what it costs in loss, against fp32 reduction.

    python -m benchmarks.compression [--ranks 2|4|...] [--steps 300] [--output FILE]

Every variant is a training job of its own, started by the launcher with the same seed and data: the tiny preset on
the Python standard library. One JSON row each: bytes that a rank sends per step, by axis and kind, and the held-out
loss and the mean loss of the last 20 steps, relative to fp32 on the same mesh. The second fp32 row is relative to the
first, from which only the order of sums differs: so much do two equal runs differ. On GPUs it is NCCL.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# Name, replicas, and what differs from fp32.
VARIANTS = {
    "fp32": (1, {}),
    "shard bf16": (1, {"reduce_dtype": "bf16"}),
    "fp32, replicas": (2, {}),
    "replicate bf16": (2, {"replicate": "bf16"}),
    "replicate int8": (2, {"replicate": "int8"}),
    "replicate fp8": (2, {"replicate": "fp8"}),
    "shard bf16, replicate int8": (2, {"reduce_dtype": "bf16", "replicate": "int8"}),
}
LAST_STEPS = 20


def train(directory: Path, data: Path, ranks: int, steps: int, name: str) -> list[dict]:
    """The metrics stream of one job."""
    directory.mkdir()
    (directory / "data").symlink_to(data)
    replicas, communication = VARIANTS[name]
    settings = {
        "parallel.replicate": replicas,
        **{f"communication.{key}": value for key, value in communication.items()},
        "data.sequence_length": 128,
        "train.steps": steps,
        "train.batch_size": 8,
        "train.warmup_steps": min(40, steps // 4),
        "train.evaluate_every_steps": "null",
        "train.heldout_sequences": 256,
        "checkpoint.every_steps": steps,
    }
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    launch = [sys.executable, "-m", "cherry.launcher", f"--nproc_per_node={ranks}", "train.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [*launch, "--config", "configs/tiny.yaml", "--run_dir", str(directory), *flags]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}")
    return [json.loads(line) for line in (directory / "train" / "metrics.jsonl").read_text().splitlines()]


def prepare(directory: Path) -> Path:
    from base.config import load
    from cherry.config import JobConfig
    from cherry.data import prepare

    config = load("configs/tiny.yaml", JobConfig, ["data.sequence_length=128"], part_of_file=True)
    prepare(config.data, vocab_size=config.model.vocab_size, directory=str(directory))
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", help="append the rows to this file too")
    options = parser.parse_args()
    about = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "command": "python -m benchmarks.compression " + " ".join(sys.argv[1:]),
    }
    references: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="compression-") as scratch:
        data = prepare(Path(scratch) / "data")
        for number, name in enumerate(options.variants):
            lines = train(Path(scratch) / str(number), data, options.ranks, options.steps, name)
            losses = {
                "loss": statistics.fmean(line["loss"] for line in lines[-LAST_STEPS:]),
                "heldout_loss": lines[-1]["heldout_loss"],
            }
            replicas, communication = VARIANTS[name]
            reference = references.get(replicas if communication else 1, losses)
            references.setdefault(replicas, losses)
            row = {
                "what": name,
                "ranks": options.ranks,
                "mesh": {"replicate": replicas, "shard": options.ranks // replicas},
                "steps": len(lines),
                **{key: round(value, 5) for key, value in losses.items()},
                **{f"{key}_change": round(value / reference[key] - 1, 5) for key, value in losses.items()},
                "bytes_per_step": lines[-1]["bytes_on_wire"],
                "reduction_bytes_over_fp32": round(lines[-1]["reduction_bytes_over_fp32"], 4),
                "step_ms": round(1000 * statistics.median(line["step_seconds"] for line in lines), 1),
                **about,
            }
            print(json.dumps(row), flush=True)
            if options.output:
                with open(options.output, "a") as handle:
                    handle.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
