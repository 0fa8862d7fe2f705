"""Measures peak memory and step time on one GPU for the configurations that plans are compared with.

    python -m benchmarks.plan_gpu [--only NAME ...] [--steps N] [--output FILE]

Sizes, recompute, micro-batch, precision, moments, sequence length, experts, chunks of the loss and the MTP module, each
changed by itself from DeepSeek-V2-Lite's widths in 1 dense and 5 MoE layers (3.43 B parameters). Prints one JSON row
each, with the plan's prediction beside it. Needs a CUDA GPU of 80 GiB or more, torch, pydantic and PyYAML.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from datetime import date
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.plan_cases import SIZES, benchmark_workload
from cherry.distributed.fsdp_hooks import install
from cherry.hardware import GIB
from cherry.job_config import JobConfig
from cherry.optim.expert_bias import update_expert_bias
from cherry.planner.memory import memory_of
from cherry.planner.step_time import step_time
from cherry.training_model import Network, build

BASE = {
    "impl": "cherry",
    "size": "3b",
    "precision": "bf16",
    "batch": 4,
    "length": 4096,
    "experts": 64,
    "layers": 6,
    "recompute": "none",
    "moments": "fp32",
    "compile": True,
    "chunk": 16384,
    "mtp": False,
}
CASES = {
    "as benchmarks.train_step": {},
    "loss in chunks of 1,024": {"chunk": 1024},
    "micro-batch of 1": {"batch": 1},
    "sequences of 16,384": {"batch": 1, "length": 16384},
    "sequences of 1,024": {"batch": 16, "length": 1024},
    "full recompute": {"recompute": "full"},
    "full recompute, micro-batch of 8": {"recompute": "full", "batch": 8, "chunk": 4096},
    "moments in bf16": {"moments": "bf16"},
    "blocks not compiled": {"compile": False},
    "blocks not compiled, full recompute": {"compile": False, "recompute": "full"},
    "16 experts, 12 layers": {"experts": 16, "layers": 12},
    "with the MTP module": {"mtp": True, "batch": 2, "experts": 32},
    "fp32": {"precision": "fp32", "batch": 1, "length": 2048, "experts": 16, "compile": False, "chunk": 1024},
}


def job_of(row: dict) -> JobConfig:
    """Job configuration of a case, as the trainer gets it."""
    model = {**SIZES[row["size"]], "n_routed_experts": row["experts"], "num_hidden_layers": row["layers"]}
    model |= {"num_nextn_predict_layers": int(row["mtp"]), "max_position_embeddings": 16384}
    train = {
        "precision": row["precision"],
        "compile": row["compile"],
        "loss_chunk_tokens": row["chunk"],
        "activation_checkpointing": row["recompute"],
        "optimizer_state_dtype": row["moments"],
        "batch_size": row["batch"],
    }
    data = {"tokenizer": "none", "sequence_length": row["length"]}
    return JobConfig.model_validate({"name": "bench", "model": model, "train": train, "data": data})


def measure(case: dict, steps: int) -> dict:
    """JSON row of one case: measured and predicted peak memory and step time."""
    row = {**BASE, **case, "gpu": torch.cuda.get_device_name()}
    torch.cuda.reset_peak_memory_stats()
    job = job_of(row)
    try:
        network = build(job, torch.device("cuda"))
        network.start(install(network.module, job.communication))
        seconds = _run(network, job, steps)
    except torch.OutOfMemoryError:
        return {**row, "failed": "out of memory"}
    step_s = statistics.median(seconds[steps // 2 :])
    return {
        **row,
        "parameters": job.model.parameters(with_mtp=True),
        "step_ms": round(1000 * step_s, 2),
        "tok_s": round(row["batch"] * row["length"] / step_s, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
    }


def _run(network: Network, job: JobConfig, steps: int) -> list[float]:
    """Seconds of each step by the device's clock, the trainer's wait for loss and norm included."""
    generator = torch.Generator().manual_seed(0)
    shape = (job.train.batch_size, job.data.sequence_length + 1)
    tokens = torch.randint(job.model.vocab_size, shape, generator=generator).cuda()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        loss, mtp_loss, balance = network.module(inputs, targets)
        mean = (loss + job.train.mtp_loss_weight * mtp_loss) / inputs.numel()
        (mean + job.train.balance_loss_weight * balance).backward()
        norm = network.gradient_norm()
        torch.stack([mean.detach(), norm.to(mean.device)]).tolist()
        update_expert_bias(network.model.moe_layers(), job.train.expert_bias_update_rate)
        network.step(norm, job.train.max_grad_norm)
        network.zero_grad()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, help="append the rows to this file of JSON lines too")
    options = parser.parse_args()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    about = {
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__},
        "command": "python -m benchmarks.plan_gpu " + " ".join(sys.argv[1:]),
    }
    for name in options.only or CASES:
        row = {"case": name, **measure(CASES[name], options.steps)}
        work = benchmark_workload(row)
        planned = {
            "planned_step_ms": round(1000 * step_time(work).total, 2),
            "planned_peak_gib": round(memory_of(work)[0].allocated / GIB, 2),
        }
        line = json.dumps({**row, **planned, **about})
        print(line, flush=True)
        if options.output:
            with options.output.open("a") as handle:
                handle.write(line + "\n")
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
