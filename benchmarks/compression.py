"""Measures compressed gradient reduction against fp32: bytes on the wire, and loss.

    python -m benchmarks.compression [--ranks 2|4|...] [--steps 300] [--output FILE]

The launcher starts the ranks once; there every variant is a training job of its own with the same seed and data: two
layers of the tiny preset's architecture, on the Python standard library. One JSON row each: bytes that a rank sends per
step, by axis and kind, and the held-out loss and the mean loss of the last 20 steps, relative to fp32 on the same mesh.
The second fp32 row is relative to the first, from which it differs in the order of sums only: the noise between equal
runs. The backend is NCCL on GPUs, else gloo.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist

from base.config import load
from cherry.data.prepare import prepare
from cherry.job_config import JobConfig

SHAPE = {
    "model.hidden_size": 64,
    "model.intermediate_size": 192,
    "model.moe_intermediate_size": 48,
    "model.num_hidden_layers": 2,
    "model.vocab_size": 1024,
    "data.sequence_length": 64,
    "data.max_documents": 400,
    "train.batch_size": 8,
    "train.heldout_sequences": 128,
}
# Name: replicas, and `communication` keys that differ from fp32.
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


def config_of(name: str, steps: int) -> JobConfig:
    replicas, communication = VARIANTS[name]
    overrides = {
        **SHAPE,
        "parallel.replicate": replicas,
        **{f"communication.{key}": value for key, value in communication.items()},
        "launch.nproc_per_node": os.environ.get("WORLD_SIZE", replicas),
        "train.steps": steps,
        "train.warmup_steps": min(40, steps // 4),
        "train.evaluate_every_steps": "null",
        "checkpoint.every_steps": steps,
    }
    return load(
        "configs/tiny.yaml", JobConfig, [f"{key}={value}" for key, value in overrides.items()], part_of_file=True
    )


def train(scratch: Path, names: list[str], steps: int) -> None:
    """Run every variant on this rank, one after the other."""
    from cherry.trainer import Trainer

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    for name in names:
        Trainer(config_of(name, steps), str(scratch / name)).run()
    dist.destroy_process_group()


def launch(scratch: Path, options: argparse.Namespace) -> None:
    config = config_of("fp32", options.steps)
    prepare(config.data, vocab_size=config.model.vocab_size, directory=str(scratch / "data"))
    for name in options.variants:
        (scratch / name).mkdir()
        (scratch / name / "data").symlink_to(scratch / "data")
    program = ["-m", "benchmarks.compression", "--scratch", str(scratch), "--steps", str(options.steps)]
    start = [sys.executable, "-m", "cherry.launcher", f"--nproc_per_node={options.ranks}"]
    ended = subprocess.run([*start, *program, "--variants", *options.variants], stdout=subprocess.DEVNULL, check=False)
    if ended.returncode:
        raise SystemExit(ended.returncode)


def read(scratch: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (scratch / name / "train" / "metrics.jsonl").read_text().splitlines()]


def _without_output(arguments: list[str]) -> list[str]:
    at = arguments.index("--output") if "--output" in arguments else len(arguments)
    return arguments[:at] + arguments[at + 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="an even number")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", help="append the rows to this file too")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.scratch is not None:
        train(options.scratch, options.variants, options.steps)
        return
    about = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "command": shlex.join(["python", "-m", "benchmarks.compression", *_without_output(sys.argv[1:])]),
    }
    references: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="compression-") as scratch:
        launch(Path(scratch), options)
        for name in options.variants:
            lines = read(Path(scratch), name)
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
