"""Measures the overhead of Prefect and MLflow: a small run through the flow, against the same programs without it.

    python -m benchmarks.flow_overhead [--rounds N] [--output FILE]

Both do the same work in the same order in fresh processes, alternating. The flow also pays for a temporary Prefect
server, tasks, MLflow runs, system metrics and plots; the very first run also creates both databases, so it is reported
separately. The overhead of an optimizer step is measured in three ways: the time that the trainer spends on its metrics
stream (its only part in tracking); the processor time of the flow and its server while a small model trains on every
core, over the trainer's own; and the ratio of step times with them running to step times with both stopped (SIGSTOP),
in alternating turns of 8 steps of one training. They catch up in the 8 steps after each stop, which are left out, and a
turn with them running is compared with the stopped turns before and after it, so that a linear drift of the machine
cancels.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil

from base import storage
from base.config import dump, load
from base.json_lines import read_lines
from cherry.data.prepare import prepare
from cherry.metrics import MetricsWriter
from cherry.train_record import read_records
from tasks.run_config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("train.steps=200", "train.evaluate_every_steps=200", "data.max_documents=200", "evaluate.documents=20")
_WARM_STEPS = 60  # the flow still sets itself up beside the first ones
_PAIRED_STEPS, _TURN_STEPS = 2000, 8
_STEADY_STEPS = 400  # over which processor time is read, before anything is stopped
LIMIT_S, LIMIT_STEP = 30.0, 0.01


def by_flow(folder: Path, name: str) -> float:
    """Seconds of the run through the flow, as the command line starts it."""
    overrides = [*SMALL, f"runs_directory={folder}", f"name={name}"]
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flows.cli", "run", "configs/tiny.yaml", *overrides]
    return _timed(command, environment)


def by_hand(folder: Path) -> float:
    """Seconds of the same programs in the same order, in a process that imports neither Prefect nor MLflow."""
    return _timed([sys.executable, "-m", "benchmarks.flow_overhead", "--by-hand", str(folder)], dict(os.environ))


def work(folder: Path) -> None:
    """Run the programs of the flow's steps without the flow."""
    config = load("configs/tiny.yaml", RunConfig, [*SMALL, f"runs_directory={folder}", "name=bench"])
    run = folder / "bench"
    storage.write_bytes(str(run / "config.yaml"), dump(config).encode())
    model = config.model
    prepare(
        config.data,
        vocab_size=model.vocab_size,
        directory=str(run / "data"),
        bos_id=model.bos_token_id,
        eos_id=model.eos_token_id,
    )
    _module(
        "cherry.launcher", "--nproc_per_node=1", "train.py", "--config", f"{run}/config.yaml", "--run_dir", str(run)
    )
    _module("cherry.export", "--run_dir", str(run), "--dtype", "bf16")
    _module("model.quantize", "--source", f"{run}/export", "--target", f"{run}/quantized")
    beside = ["--model_path", f"{run}/quantized", "--reference", f"{run}/export"]
    for number, chosen in enumerate((beside, ["--untrained", "--config", f"{run}/config.yaml"])):
        limits = [
            "--documents",
            str(config.evaluate.documents),
            "--max_tokens",
            str(config.evaluate.max_document_tokens),
        ]
        _module("cherry.scoring", *chosen, "--data_dir", f"{run}/data", "--output", f"{run}/nll-{number}.json", *limits)


def _module(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", name, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def beside_training(folder: Path) -> dict[str, float]:
    """Overhead of the flow and its server on a step: their processor time over its own, and the ratio of step times."""
    never = 100 * _PAIRED_STEPS  # saves and evaluations would fall into some turns and not into others
    own = [f"train.steps={_PAIRED_STEPS}", f"train.evaluate_every_steps={never}", f"checkpoint.every_steps={never}"]
    overrides = [*SMALL, f"runs_directory={folder}", "name=paired", *own]
    environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flows.cli", "run", "configs/tiny.yaml", *overrides]
    run = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT)
    metrics = folder / "paired" / "train" / "metrics.jsonl"
    try:
        steps = _wait_for_steps(run, metrics, _WARM_STEPS)
        beside = [run, *_children(run, "flows.prefect_server")]
        trainers = _children(run, "cherry.rank_main", but="cherry.launcher")
        before = _processor_s(beside), _processor_s(trainers)
        steps = _wait_for_steps(run, metrics, steps + _STEADY_STEPS)
        share = (_processor_s(beside) - before[0]) / (_processor_s(trainers) - before[1])
        turns = _take_turns(run, metrics, beside, steps)
    finally:
        with suppress(psutil.NoSuchProcess):  # it ended by itself, which has its own error
            everything = [run, *run.children(recursive=True)]
            run.terminate()
            psutil.wait_procs(everything, timeout=30)  # the others end with it
    seconds = [json.loads(line)["step_seconds"] for line in metrics.read_text().splitlines()]
    # The step in which they were stopped or went on belongs to neither.
    alone = [statistics.fmean(seconds[start + 1 : start + _TURN_STEPS]) for start, _ in turns]
    together = [statistics.fmean(seconds[start + 1 : start + _TURN_STEPS]) for _, start in turns]
    # The middle of a running turn is 16 steps after that of the stopped turn before, and 8 before the next one's.
    ratios = [t / (a / 3 + 2 * b / 3) for t, a, b in zip(together, alone, alone[1:], strict=False)]
    shared = max(0.0, statistics.covariance(ratios[:-1], ratios[1:]))  # neighbours have a stopped turn in common
    variance = (statistics.variance(ratios) + 2 * shared) / len(ratios)
    return {
        "processor_time_over_the_trainers": round(share, 5),
        "step_time_ratio_beside_the_flow": round(statistics.fmean(ratios), 4),
        "standard_error": round(variance**0.5, 4),
        "turns": len(ratios),
    }


def _take_turns(run: psutil.Popen, metrics: Path, beside: list[psutil.Process], steps: int) -> list[tuple[int, int]]:
    """First steps of the turns with these processes stopped, and of the turns after them with the processes running."""
    turns = []
    try:
        while steps + 3 * _TURN_STEPS < _PAIRED_STEPS:
            for process in beside:
                process.suspend()
            resumed = _wait_for_steps(run, metrics, steps + _TURN_STEPS)
            for process in beside:
                process.resume()
            caught_up = _wait_for_steps(run, metrics, resumed + _TURN_STEPS)
            turns.append((steps, caught_up))
            steps = _wait_for_steps(run, metrics, caught_up + _TURN_STEPS)
    finally:  # nothing stays stopped where this is interrupted
        for process in filter(psutil.Process.is_running, beside):
            process.resume()
    return turns


def _children(run: psutil.Popen, word: str, but: str = "") -> list[psutil.Process]:
    """Descendant processes with this word in their command lines, and without the other word."""
    found = [(child, child.cmdline()) for child in run.children(recursive=True)]
    return [child for child, words in found if word in words and but not in words]


def _processor_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _wait_for_steps(run: psutil.Popen, metrics: Path, count: int) -> int:
    """Step records of the metrics stream, once there are at least so many.

    Raises:
        SystemExit: the run ended before.
    """
    while (found := metrics.read_bytes().count(b"\n") if metrics.exists() else 0) < count:
        if run.poll() is not None:
            raise SystemExit(f"the run ended with {run.returncode} after {found} of {count} steps")
        time.sleep(0.05)
    return found


def _timed(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT)
    return time.perf_counter() - started


def _steps(folder: Path) -> list[float]:
    lines = (folder / "train" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step_seconds"] for line in lines][_WARM_STEPS:]


def _seconds_per_write(folder: Path) -> float:
    """Seconds that the trainer spends on one line of its metrics stream."""
    records = read_records(read_lines(folder / "train" / "metrics.jsonl"))
    writer = MetricsWriter(folder / "again.jsonl", resume_step=0)
    started = time.perf_counter()
    for record in records:
        writer.write(record)
    seconds = (time.perf_counter() - started) / len(records)
    writer.close()
    return seconds


def measure(rounds: int) -> list[dict]:
    flow_s: list[float] = []
    hand_s: list[float] = []
    hand_steps: list[float] = []
    with tempfile.TemporaryDirectory() as home:

        def flow(number: int) -> None:
            name = f"bench-{number}"
            flow_s.append(by_flow(Path(home), name))

        def hand(number: int) -> None:
            with tempfile.TemporaryDirectory() as folder:
                hand_s.append(by_hand(Path(folder)))
                hand_steps.extend(_steps(Path(folder) / "bench"))

        for number in range(1 + rounds):
            for side in (flow, hand) if number % 2 == 0 else (hand, flow):
                side(number)
        write_s = _seconds_per_write(Path(home) / "bench-0")
        beside = beside_training(Path(home))
    step_s = statistics.median(hand_steps)
    overhead_s = [whole - bare for whole, bare in zip(flow_s, hand_s, strict=True)]  # of one round each
    return [
        {
            "what": "flow overhead of a run",
            "overhead_s": round(statistics.median(overhead_s[1:]), 2),
            "first_overhead_s": round(overhead_s[0], 2),
            "limit_s": LIMIT_S,
            "flow_s": [round(s, 2) for s in flow_s],
            "by_hand_s": [round(s, 2) for s in hand_s],
        },
        {
            "what": "tracking's share of a training step",
            "share": round(write_s / step_s, 6),
            "limit": LIMIT_STEP,
            "step_ms": round(1000 * step_s, 2),
            "metrics_write_ms": round(1000 * write_s, 4),
            **beside,
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="after the first, whose flow makes the databases")
    parser.add_argument("--output", help="append the rows to this file too")
    parser.add_argument(
        "--by-hand", type=Path, metavar="DIR", help="do the work without the flow, once (used by itself)"
    )
    options = parser.parse_args()
    if options.by_hand:
        work(options.by_hand)
        return
    about = {
        "machine": f"CPU, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("prefect", "mlflow", "torch")},
        "command": "python -m benchmarks.flow_overhead " + " ".join(sys.argv[1:]),
    }
    for row in measure(options.rounds):
        text = json.dumps({**row, **about})
        print(text, flush=True)
        if options.output:
            with open(options.output, "a") as handle:
                handle.write(text + "\n")


if __name__ == "__main__":
    main()
