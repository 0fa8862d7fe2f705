"""Compares the planner's predictions with measured, published and simulated figures, and writes the comparison.

    python -m benchmarks.plan [--output benchmarks/results/plan.json]

One row for each figure: `case, kind, predicted, measured, ratio, source`; where the two are not comparable in some
respect, the source ends with a sentence that says so. Kinds: `memory` (GiB) and `time` (ms) of steps on one GPU, from
the other files of results/; `published` (tokens/s/GPU) of others' clusters, on which nothing is calibrated;
`simulated` (bytes of a rank) from benchmarks.simulated_step; `goodput` from benchmarks/goodput_simulation.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.goodput_simulation import simulate as simulate_life
from benchmarks.plan_cases import benchmark_workload, gpu_of
from cherry.hardware import GIB, GPUS
from cherry.job_config import ParallelConfig
from cherry.planner.goodput import DAY_S, Reliability, goodput
from cherry.planner.memory import fsdp_buffers, memory_of
from cherry.planner.step_time import step_time
from cherry.planner.units import network_of
from cherry.planner.workload import Workload
from cherry.train_config import TrainConfig
from model.model_config import PRESETS, ModelConfig

RESULTS = Path(__file__).with_name("results")
# Failures a day; seconds of a restart, a stall, a write and a step; steps between saves.
LIVES = {
    "671B on 256 GPUs": (0.12, 380.0, 0.05, 165.0, 17.4, 100),
    "671B on 1,024 GPUs": (0.49, 380.0, 0.05, 165.0, 9.0, 200),
    "16,384 GPUs, saves in the background": (7.76, 900.0, 2.0, 160.0, 17.0, 60),
    "16,384 GPUs, saves in the foreground": (7.76, 900.0, 160.0, 0.0, 17.0, 120),
    "100,000 GPUs": (47.4, 600.0, 5.0, 100.0, 10.0, 30),
}
LIFE_STEPS, LIFE_SEEDS = 40_000, 8


def row(case: str, kind: str, predicted: float, measured: float, source: str) -> dict[str, object]:
    """Row of one comparison."""
    figures = {"predicted": round(predicted, 4), "measured": measured, "ratio": round(predicted / measured, 4)}
    return {"case": case, "kind": kind, **figures, "source": source}


def measured_steps() -> Iterator[dict[str, object]]:
    """Rows of measured steps on one GPU and on several of a host."""
    for name in ("train_step.json", "scale.json", "plan_gpu.jsonl", "multi_gpu.json"):
        path = RESULTS / name
        text = path.read_text() if path.exists() else ""
        rows = json.loads(text) if name.endswith("json") else [json.loads(line) for line in text.splitlines()]
        for kept in rows:
            if not kept["impl"].startswith("cherry") or "batch" not in kept or "failed" in kept:
                continue  # another implementation, or an earlier engine
            if gpu_of(kept["gpu"]) is None:
                continue  # a CPU: its plan is a rough estimate
            work = benchmark_workload(kept)
            case = kept.get("case") or f"{kept['batch']} x {kept['length']}, {kept['experts']} experts"
            case += "" if kept["impl"] == "cherry" else f", {kept['impl']}"
            case = f"{kept['size']} on {_gpus(kept)}: {case}"
            source = f"benchmarks/results/{name}, {kept['date']}"
            yield row(case, "memory", memory_of(work)[0].allocated / GIB, kept["peak_gib"], source)
            yield row(case, "time", 1000 * step_time(work).total, kept["step_ms"], source)


def _gpus(row: dict) -> str:
    """The GPUs of a measured step, with the layout where they are several."""
    ranks = row.get("world", 1)
    return row["gpu"] if ranks == 1 else f"{ranks} {row['gpu']}, {row['layout']}"


def released(gpu: str, ranks: int, expert: int, sequences: int, precision: str, **keys: object) -> Workload:
    """Workload of the 671B release without MTP, with full recompute and balanced routing, as in vendors' figures."""
    model = ModelConfig.model_validate({**PRESETS["671b"], "num_nextn_predict_layers": 0})
    work = Workload(
        model=model,
        gpu=GPUS[gpu],
        gpus_per_node=8,
        replicate=1,
        shard=ranks // expert,
        context=1,
        expert=expert,
        micro_sequences=sequences,
        accumulation=1,
        sequence_length=4096,
        precision=precision,
        recompute="full",
        compile=True,
    )
    return replace(work, **keys)


# Sentences for layouts that the planner cannot express.
_PIPELINE = (
    "Pipeline and tensor parallelism cannot be expressed: this is FSDP2 with experts over 64 ranks, which gathers"
)
_PIPELINE += " every block's weights for each of 8 sequences."
_STAGES = "Their 4 pipeline stages cannot be expressed: this is FSDP2 over all ranks, experts over 64 like theirs."
_UNSTATED = "The layout was not stated where this was read: experts over 32 ranks are assumed, and these sequences."
_MEGATRON = "Megatron-Bridge's performance summary, DGX H100: 8,192 sequences a step"
_NEMO = "NeMo Automodel's performance summary of 2025-10, DGX H100, DeepEP"
_TITAN = "PyTorch's blog of 2026-03 on MXFP8 and DeepEP with TorchTitan (B200, Nebius)"
_ONCE = {"expert_ranks_per_node": 8, "fused_all_to_all": True}  # DeepEP, or a dispatch of their own that does the same
_ONCE_2, _ONCE_8 = {"accumulation": 2, **_ONCE}, {"accumulation": 8, **_ONCE}
# Case; arguments of `released`; tokens/s/GPU; source, and in what it is not comparable.
PUBLISHED = (
    (
        "DeepSeek: 2,048 H800, fp8",
        ("H800", 2048, 64, 1, "fp8", {"moment_bytes": 2, **_ONCE_8}),
        1543.0,
        "DeepSeek-V3, arXiv 2412.19437, table 1: 180K H800 hours a trillion tokens. "
        f"{_PIPELINE} Theirs is DualPipe over 16 stages, behind which the all-to-all hides.",
    ),
    ("Megatron: 1,024 H100, bf16", ("H100", 1024, 64, 1, "bf16", _ONCE_8), 1061.0, f"{_MEGATRON}. {_PIPELINE}"),
    (
        "Megatron: 1,024 H100, fp8",
        ("H100", 1024, 64, 1, "fp8", _ONCE_8),
        1297.0,
        f"{_MEGATRON}, 2 tensor ranks, 8 pipeline stages, experts over 64. {_PIPELINE} "
        "Gathering bounds both precisions.",
    ),
    ("NeMo Automodel: 256 H100, bf16", ("H100", 256, 64, 1, "bf16", _ONCE_2), 1002.0, f"{_NEMO}. {_STAGES}"),
    ("NeMo Automodel: 1,024 H100, bf16", ("H100", 1024, 64, 1, "bf16", _ONCE_8), 865.0, f"{_NEMO}. {_STAGES}"),
    ("torchtitan: 256 B200, bf16; 1 sequence", ("B200", 256, 32, 1, "bf16", {}), 651.0, f"{_TITAN}. {_UNSTATED}"),
    ("torchtitan: 256 B200, bf16; 4 sequences", ("B200", 256, 32, 4, "bf16", {}), 651.0, f"{_TITAN}. {_UNSTATED}"),
    (
        "torchtitan, DeepEP: 256 B200, bf16; 1 sequence",
        ("B200", 256, 32, 1, "bf16", _ONCE),
        859.0,
        f"{_TITAN}. {_UNSTATED}",
    ),
)


def published() -> Iterator[dict[str, object]]:
    """Rows of published DeepSeek-V3 throughput at 4,096 tokens."""
    for case, (gpu, ranks, expert, sequences, precision, keys), measured, source in PUBLISHED:
        work = released(gpu, ranks, expert, sequences, precision, **keys)
        assert memory_of(work)[0].fits, case
        yield row(case, "published", step_time(work).tokens_per_s_gpu, measured, source)


# Ranks, expert parallel ranks, replicas: published layouts, and those of configs/ on so many GPUs.
SIMULATED = ((256, 64, 1), (1024, 64, 1), (256, 32, 1), (512, 32, 2), (1024, 32, 4))


def simulated() -> Iterator[dict[str, object]]:
    """Rows of a rank's bytes against a step of the real sharding on fake ranks."""
    from benchmarks.simulated_step import simulate, slice_of_671b

    config = slice_of_671b()
    train = TrainConfig(precision="bf16", activation_checkpointing="full")
    for ranks, expert, replicate in SIMULATED:
        parallel = ParallelConfig(expert=expert, replicate=replicate)
        held = asdict(simulate(config, ranks, parallel, train, sequences=1, length=4096))
        shard = ranks // expert // replicate
        work = released("H100", ranks, expert, 1, "bf16", model=config, replicate=replicate, shard=shard)
        network = network_of(work)
        planned = {
            "parameters": 4 * network.total("padded"),
            "gradients": 4 * network.total("padded_trained"),
            "states": 8 * network.total("padded_trained"),
            **asdict(fsdp_buffers(work)),
            "peak": memory_of(work)[0].allocated,
        }
        for kind, size in held.items():
            copies = f", {replicate} replicas" if replicate > 1 else ""
            case = f"slice of 671B on {ranks:,} ranks, experts over {expert}{copies}: {kind.replace('_', ' ')}"
            yield row(case, "simulated", planned[kind], size, "benchmarks.simulated_step (torch's FSDPMemTracker)")


def lives() -> Iterator[dict[str, object]]:
    """Rows of the closed form of goodput against an event simulation."""
    for case, (daily, restart, stall, write, step, interval) in LIVES.items():
        costs = Reliability(daily / DAY_S, restart, stall, write)
        found = [simulate_life(costs, step, interval, LIFE_STEPS, seed).goodput for seed in range(LIFE_SEEDS)]
        source = f"benchmarks/goodput_simulation.py, {LIFE_SEEDS} lives of {LIFE_STEPS:,} steps"
        yield row(case, "goodput", goodput(costs, interval * step), round(sum(found) / len(found), 4), source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan.json")
    options = parser.parse_args()
    rows = [*measured_steps(), *published(), *simulated(), *lives()]
    options.output.write_text("[\n" + ",\n".join(json.dumps(comparison) for comparison in rows) + "\n]\n")
    print(f"{'kind':<10} {'ratio':>7}  {'predicted':>16} {'measured':>16}  case")
    for comparison in rows:
        figures = f"{comparison['ratio']:>7.3f}  {comparison['predicted']:>16,.3f} {comparison['measured']:>16,.3f}"
        print(f"{comparison['kind']:<10} {figures}  {comparison['case']}")
        if comparison["kind"] == "published":
            print(f"{'':<55}{comparison['source']}")


if __name__ == "__main__":
    main()
