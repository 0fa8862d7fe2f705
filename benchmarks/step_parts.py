"""Profiles the GPU time of a training step by operation, with a roofline floor for each.

    python -m benchmarks.step_parts [--size 3b] [--output FILE]

Profiles a few steps of what `benchmarks.train_step --impl cherry` runs, and groups its kernels into parts. A part's
floor is its FLOPs at the rate of an 8192 x 8192 x 8192 bf16 matmul (twice that in fp8), or its bytes at the bandwidth
of a large copy, both measured on this device in the same run. Prints a table, and one JSON row for each part.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.plan_cases import benchmark_workload
from benchmarks.train_step import SIZES, build_cherry
from cherry.planner.matmuls import layer_matmuls
from model.model_config import ModelConfig

STEPS = 3
# A kernel belongs to the part whose pattern matches its name first.
PARTS = {
    "AdamW with clip": r"^_adamw",
    "gradient norm": r"_square_sums",
    "loss from logits": r"_softmax_gradient",
    "gated activation of experts": r"^_swiglu",
    "rows to experts and back": r"_sum_topk|index_?[sS]elect|gather",
    "operands of fp8 matmuls": r"^_cast",
    "attention": r"sdpa|flash|fmha|cudnn::fusion",
    "grouped matmuls of experts": r"GroupProblemShape|_grouped",
    "fp8 matmuls": r"^_matmul$",
    "matmuls": r"nvjet|gemm|cutlass|xmma",
    "fused elementwise": r"^triton_",
    "copies and fills": r"[mM]emcpy|[mM]emset|copy|fill",
}


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large bf16 matmul and bytes/s of a large copy (read and written), medians of repeats."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    large = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(large)
    return 2 * 8192**3 / _seconds(lambda: a @ a), 4 * large.numel() / _seconds(lambda: target.copy_(large))


def _seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[3:])


def floors(
    config: ModelConfig, tokens: int, length: int, flops: float, bandwidth: float, *, moment_bytes: int
) -> dict[str, float]:
    """Least milliseconds of each part, forward and backward, from its FLOPs or bytes."""
    width, rows = config.hidden_size, tokens * config.num_experts_per_tok
    layers = config.num_hidden_layers - config.first_k_dense_replace
    experts = 3 * width * config.moe_intermediate_size
    head = width * config.vocab_size
    parameters = config.parameters()
    others = config.matmul_parameters() - head - layers * config.num_experts_per_tok * experts
    per_pair = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    narrow, wide = 2 * rows * config.moe_intermediate_size, 4 * rows * config.moe_intermediate_size
    work = {
        "grouped matmuls of experts": 6 * rows * layers * experts,
        "head's matmuls": 6 * tokens * head,
        "other matmuls": 6 * tokens * others,
        # Half of the square; the backward pass recomputes the scores: 2 + 5 products against 2.
        "attention": 3.5 * tokens * length * per_pair * config.num_hidden_layers,
    }
    moved = {
        # Parameter and moments read and written, gradient read, copy written.
        "AdamW with clip": (12 + 4 * moment_bytes) * parameters,
        "gradient norm": 2 * parameters,
        "loss from logits": 2 * 2 * tokens * config.vocab_size,
        "gated activation of experts": layers * (3 * wide + 3 * narrow),
        "rows to experts and back": layers * 4 * 2 * width * (rows + tokens),
    }
    times = {name: 1000 * count / flops for name, count in work.items()}
    return times | {name: 1000 * count / bandwidth for name, count in moved.items()}


def fp8_floors(row: dict, flops: float, bandwidth: float) -> dict[str, float]:
    """Least milliseconds of the parts that differ in fp8. Each pass reads bf16 and writes e4m3 plain and transposed."""
    work = benchmark_workload(row)
    model = work.model
    mixture = model.num_hidden_layers - model.first_k_dense_replace
    count, moved, activation = 0.0, 0.0, 0.0
    for layers, moe in ((model.first_k_dense_replace, False), (mixture, True)):
        for matmul in (found for found in layer_matmuls(work, moe=moe) if found.precision == "fp8"):
            count += layers * 3 * matmul.flops
            # Between the experts' two matmuls the activation and its gradient make the operands.
            sides = {"experts_gate_up": matmul.into, "experts_down": matmul.out}.get(
                matmul.name, matmul.into + matmul.out
            )
            moved += layers * 4 * matmul.count * (matmul.rows * sides + matmul.into * matmul.out)
            if matmul.name == "experts_down":  # reads gate and up, backward the gradient too; writes one, then five
                activation += layers * matmul.count * (5 + 11) * matmul.rows * matmul.into
    return {
        "fp8 matmuls": 1000 * count / (2 * flops),
        "operands of fp8 matmuls": 1000 * moved / bandwidth,
        "gated activation of experts": 1000 * activation / bandwidth,
    }


def measured(step: Callable[[], object], config: ModelConfig) -> tuple[dict[str, float], Counter[str]]:
    """Milliseconds of a step by part, and of the kernels that match no part."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiled:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    parts, unknown, head = Counter[str](), Counter[str](), 0.0
    for row in profiled.key_averages(group_by_input_shape=True):
        ms = row.self_device_time_total / 1000 / STEPS
        if row.key.startswith(("## Call", "Optimizer.step")):
            continue  # ranges around kernels, which are counted by themselves
        if row.device_type == torch.autograd.DeviceType.CUDA:
            part = next((part for part, pattern in PARTS.items() if re.search(pattern, row.key)), None)
            parts[part or "other kernels"] += ms
            if part is None:
                unknown[row.key[:90]] += ms
        elif row.key == "aten::mm" and any(config.vocab_size in shape for shape in row.input_shapes):
            head += ms
    parts["head's matmuls"] = head
    parts["other matmuls"] = parts.pop("matmuls", 0.0) - head
    return dict(parts), unknown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--moments", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--output", help="append the rows to this file of JSON lines too")
    options = parser.parse_args()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    keys, batch, length = SIZES[options.size]
    config = ModelConfig.model_validate(keys)
    flops, bandwidth = ceilings()
    torch.cuda.empty_cache()
    changes = {"precision": options.precision, "optimizer_state_dtype": options.moments}
    step = build_cherry(config, torch.device("cuda"), compiled=True, chunk=batch * length, **changes)
    data = torch.randint(config.vocab_size, (batch, length + 1), device="cuda")
    tokens, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    for _ in range(5):
        step(tokens, targets)
    whole_ms = 1000 * _seconds(lambda: step(tokens, targets))
    parts, unknown = measured(lambda: step(tokens, targets), config)
    gpu, moment_bytes = torch.cuda.get_device_name(), 2 if options.moments == "bf16" else 4
    least = floors(config, batch * length, length, flops, bandwidth, moment_bytes=moment_bytes)
    if options.precision == "fp8":
        kept = {"impl": "", "size": options.size, "gpu": gpu, "batch": batch, "length": length, "precision": "fp8"}
        least |= fp8_floors({**kept, "experts": config.n_routed_experts}, flops, bandwidth)
        del least["grouped matmuls of experts"], least["other matmuls"]
    print(f"{gpu}: matmul {flops / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s; a step {whole_ms:.1f} ms")
    print(f"{'part':32}{'ms':>8}{'floor':>8}")
    rows = []
    for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
        floor = least.get(part)
        print(f"{part:32}{ms:8.2f}{'' if floor is None else f'{floor:8.2f}'}")
        rows.append({"part": part, "ms": round(ms, 2), "floor_ms": None if floor is None else round(floor, 2)})
    print(f"{'all kernels':32}{sum(parts.values()):8.2f}{sum(least.values()):8.2f}")
    for name, ms in unknown.most_common(12):
        print(f"    {ms:6.2f} {name}")
    about = {
        "gpu": gpu,
        "size": options.size,
        "step_ms": round(whole_ms, 2),
        "precision": options.precision,
        "moments": options.moments,
        "matmul_tflops": round(flops / 1e12, 1),
        "copy_tbs": round(bandwidth / 1e12, 3),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__},
        "command": "python -m benchmarks.step_parts " + " ".join(sys.argv[1:]),
    }
    for row in rows:
        print(json.dumps({**row, **about}))
        if options.output:
            with Path(options.output).open("a") as file:
                file.write(json.dumps({**row, **about}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
