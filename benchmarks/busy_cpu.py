"""Measures training speed on a CPU that other programs keep busy, by how OpenMP's threads wait for each other.

    python -m benchmarks.busy_cpu [--load N] [--steps N] [--rounds N] [--output FILE]

Each setting trains the tiny model for a few steps through `cherry-launch`, in turn, beside `--load` programs that only
count. `spinning` is GNU OpenMP's default, `passive` what the launcher sets, `one thread` needs no waiting. One row.
`taskset -c 0,1` before it gives a large machine the two cores of a small one.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

SETTINGS = {
    "spinning": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "passive": {},
}
CONFIG = """\
name: busy
model: {{preset: tiny}}
data: {{max_documents: 300, sequence_length: 256}}
train: {{steps: {steps}, batch_size: 16, learning_rate: 1.0e-3, warmup_steps: 2, log_every_steps: 1}}
"""
SKIPPED_STEPS = 2


def train(folder: Path, variables: dict[str, str]) -> float:
    """Median tokens/s of one training, without its first steps."""
    run = folder / "run"
    shutil.rmtree(run / "train", ignore_errors=True)
    program = ["-m", "cherry.rank_main", "--config", str(folder / "config.yaml"), "--run_dir", str(run)]
    command = [sys.executable, "-m", "cherry.launcher", *program]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    subprocess.run(command, env=environment | variables, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["tokens_per_second"] for line in lines][SKIPPED_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=int, default=10, help="programs that keep the CPU busy")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    speeds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(CONFIG.format(steps=options.steps))
        train(folder, {})  # prepares the data
        counting = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.load)]
        try:
            for _ in range(options.rounds):
                for setting, variables in SETTINGS.items():
                    speeds[setting].append(train(folder, variables))
                    print(f"{setting}: {speeds[setting][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
        finally:
            for process in counting:
                process.kill()
    medians = {setting: statistics.median(values) for setting, values in speeds.items()}
    row = {
        "benchmark": "busy_cpu",
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.busy_cpu", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)),
        "load": options.load,
        "tokens_per_second": {setting: [round(value) for value in values] for setting, values in speeds.items()},
        "passive_over_spinning": round(medians["passive"] / medians["spinning"], 2),
        "passive_over_one_thread": round(medians["passive"] / medians["one thread"], 2),
    }
    print(json.dumps(row))
    if options.output is not None:
        with options.output.open("a") as output:
            output.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
