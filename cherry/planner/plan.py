"""The plan of one job on one cluster: memory, speed, checkpoints, failures, duration and cost; as JSON too."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cherry.cluster import ClusterSpec
from cherry.hardware import GIB, PROCESS_BYTES, Gpu
from cherry.job_config import JobConfig
from cherry.planner.goodput import DAY_S, Reliability, best_interval_s, goodput, young_interval_s
from cherry.planner.memory import RankMemory, memory_of
from cherry.planner.optimizer_cost import checkpoint_state_bytes
from cherry.planner.step_time import StepTime, step_time
from cherry.planner.units import whole_network
from cherry.planner.workload import Workload, workload_of

# A save's stall where the copy hides behind the next passes: 49 ms (benchmarks/results/checkpoint_stall.jsonl).
_STALL_S = 0.05
_HOUR_S = 3600.0
# What a plan leaves out; printed with it.
NOT_MODELLED = (
    "other jobs on the network and on storage, slow links and slow GPUs",
    "computation slowed down by NCCL's kernels beside it",
    "the host's memory: pinned copies of a save, cpu_offload",
    "evaluation, data loading, and compilation of the first step",
)


@dataclass(frozen=True)
class RunPlan:
    """Figures of the whole run; seconds and bytes."""

    steps: int
    tokens: int
    checkpoint_bytes: int
    save_s: float
    """Seconds until a save is committed; training continues meanwhile but for the stall."""
    stall_s: float
    restore_s: float
    every_steps: int
    best_every_steps: int
    young_every_steps: int
    goodput: float
    best_goodput: float
    interruptions: float
    compute_s: float
    """Seconds of the optimizer steps, without saves, failures and restarts."""
    wall_s: float
    gpu_hours: float
    cost: float | None


@dataclass(frozen=True)
class Plan:
    """Predicted memory, step time and run of one job on one cluster."""

    job: str
    cluster: ClusterSpec
    work: Workload
    memory: tuple[RankMemory, ...]
    step: StepTime
    run: RunPlan

    @property
    def fits(self) -> bool:
        """Whether every class of ranks has room."""
        return all(ranks.fits for ranks in self.memory)

    @property
    def worst(self) -> RankMemory:
        """Memory of the ranks that need most."""
        return max(self.memory, key=lambda ranks: ranks.total)

    def why_not(self) -> str:
        """Why a plan does not fit, a line each: what is short, the peak, what is usable, what exceeds it."""
        ranks, left = self.worst, self.worst.usable
        largest = max(ranks.components, key=lambda name: ranks.components[name])
        breaking = largest
        for name, size in ranks.components.items():
            left -= size
            if left < 0:
                breaking = name
                break
        lines = [
            f"{self.job} does not fit: short by {(ranks.total - ranks.usable) / GIB:,.1f} GiB on {ranks.name}",
            f"needed: {ranks.total / GIB:,.1f} GiB at the peak, in {ranks.peak_stage}",
            f"usable: {ranks.usable / GIB:,.1f} GiB of {self.work.gpu.name}",
            f"no room for {breaking}: {ranks.components[breaking] / GIB:,.1f} GiB",
        ]
        if largest != breaking:
            lines.append(f"the largest part: {largest}, {ranks.components[largest] / GIB:,.1f} GiB")
        return "\n  - ".join(lines)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak bytes of a rank as a run measures them: of the whole process on a CPU, of torch's tensors on a GPU."""
        return self.worst.allocated + (PROCESS_BYTES if self.work.gpu.shared_memory else 0)

    @property
    def host_bytes_per_node(self) -> int:
        """Bytes of a node's own memory that its ranks take at the peak: 0 where a GPU has memory of its own."""
        if not self.work.gpu.shared_memory:
            return 0
        return (self.worst.total + PROCESS_BYTES) * self.work.gpus_per_node

    def predictions(self) -> dict[str, float]:
        """Predicted figures that a run also measures, under the names of the measured ones."""
        return {
            "predicted_step_seconds": self.step.total,
            "predicted_tokens_per_second": self.step.tokens_per_s,
            "predicted_peak_memory_gib": self.peak_memory_bytes / GIB,
            "predicted_goodput": self.run.goodput,
        }

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values: what plan.json holds."""
        work, step, run = self.work, self.step, self.run
        return {
            "job": self.job,
            "fits": self.fits,
            "cluster": self.cluster.model_dump(mode="json"),
            "layout": layout_of(work),
            "memory": {
                ranks.name: {
                    "usable_bytes": ranks.usable,
                    "total_bytes": ranks.total,
                    "allocated_bytes": ranks.allocated,
                    "peak_stage": ranks.peak_stage,
                    "components_bytes": ranks.components,
                    "stages_bytes": {name: sum(stage.values()) for name, stage in ranks.stages.items()},
                }
                for ranks in self.memory
            },
            "step": {
                "seconds": step.total,
                "busy_s": step.busy,
                "exposed_s": step.exposed,
                "bubbles_s": step.bubbles,
                "travelling_s": step.collectives,
                "matmuls": [
                    {**asdict(timed.matmul), "seconds": timed.seconds, "flops_per_s": timed.flops / timed.seconds}
                    for timed in step.matmuls
                ],
                "tokens_per_s_gpu": step.tokens_per_s_gpu,
                "tokens_per_s": step.tokens_per_s,
                "mfu_causal": step.mfu(causal=True),
                "mfu_full": step.mfu(causal=False),
            },
            "run": {key: _finite(value) for key, value in vars(run).items()},
            "not_modelled": list(NOT_MODELLED),
            **self.predictions(),
        }


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def layout_of(work: Workload) -> dict[str, Any]:
    """Values of the configuration's keys that a search varies."""
    return {
        "parallel.replicate": work.replicate,
        "parallel.shard": work.shard,
        "parallel.context": work.context,
        "parallel.expert": work.expert,
        "parallel.reshard_after_forward": work.reshard_after_forward,
        "train.batch_size": work.batch_sequences,
        "train.gradient_accumulation_steps": work.accumulation,
        "train.activation_checkpointing": work.recompute,
        "train.precision": work.precision,
    }


def make_plan(config: JobConfig, cluster: ClusterSpec, gpu: Gpu | None = None) -> Plan:
    """The plan of a job on a cluster.

    Args:
        gpu: device to plan for in place of the cluster spec's.

    Raises:
        ConfigError: the job asks for what the cluster does not have.
    """
    return plan_of(config, cluster, workload_of(config, cluster, gpu))


def plan_of(config: JobConfig, cluster: ClusterSpec, work: Workload) -> Plan:
    """The plan of a job in the layout of `work`, which may differ from the job's own."""
    step = step_time(work)
    return Plan(config.name, cluster, work, memory_of(work), step, run_plan(config, cluster, work, step))


def checkpoint_bytes(config: JobConfig) -> int:
    """Bytes of one checkpoint over all ranks: fp32 parameters, frozen ones included, and the optimizer's states."""
    network = whole_network(config.model, config.lora)
    return 4 * network.total("elements") + checkpoint_state_bytes(network, config.train)


def run_plan(config: JobConfig, cluster: ClusterSpec, work: Workload, step: StepTime) -> RunPlan:
    """Checkpoints, failures, duration and cost of a job in the layout of `work`."""
    train, held = config.train, checkpoint_bytes(config)
    copy_s = held / work.ranks * work.replicate / work.gpu.host_rate
    stall_s = _STALL_S + max(0.0, copy_s - step.total) if config.checkpoint.asynchronous else 0.0
    save_s = copy_s + held / cluster.storage_write_bytes_s
    if not config.checkpoint.asynchronous:
        stall_s, save_s = save_s, 0.0
    restore_s = held / cluster.storage_read_bytes_s
    rate = cluster.interruptions_per_gpu_day * work.ranks / DAY_S
    costs = Reliability(rate, cluster.detection_s + cluster.restart_s + restore_s, stall_s, save_s)
    best = _steps(best_interval_s(costs) if rate else math.inf, step.total, train.steps)
    reached = goodput(costs, config.checkpoint.every_steps * step.total)
    compute_s = train.steps * step.total
    wall_s = compute_s / reached if reached > 0 else math.inf
    gpu_hours = wall_s * work.ranks / _HOUR_S
    price = cluster.price_per_gpu_hour
    return RunPlan(
        steps=train.steps,
        tokens=train.steps * train.batch_size * config.data.sequence_length,
        checkpoint_bytes=held,
        save_s=save_s,
        stall_s=stall_s,
        restore_s=restore_s,
        every_steps=config.checkpoint.every_steps,
        best_every_steps=best,
        young_every_steps=_steps(young_interval_s(costs) if rate else math.inf, step.total, train.steps),
        goodput=reached,
        best_goodput=goodput(costs, best * step.total),
        interruptions=wall_s * rate,
        compute_s=compute_s,
        wall_s=wall_s,
        gpu_hours=gpu_hours,
        cost=None if price is None else price * gpu_hours,
    )


def _steps(interval_s: float, step_s: float, most: int) -> int:
    return most if math.isinf(interval_s) else max(1, min(most, round(interval_s / step_s)))
