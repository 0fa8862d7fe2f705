"""Measures the matmuls of fp8 training against bf16 on a Hopper GPU.

    python -m benchmarks.fp8_matmuls [--output FILE]

Grouped matmuls have the sizes of a DeepSeek-V2-Lite layer: 64 experts, 16,384 tokens with 6 top-k slots each, routed
unevenly (0.5 to 1.5 times the mean). `rows` is the forward pass, `gradient` the weight gradient; the input gradient is
`rows` by the other matrix. Each figure is the median of repeats that were queued together, without quantization casts,
which have rows of their own with the bytes that they read and write. Prints one JSON row each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from model.experts import permutation_by_expert
from model.fp8 import cast_kernels, gemm_hopper
from model.fp8.linear import pad_rows

TOKENS, TOP_K, EXPERTS, WIDTH, INTERMEDIATE = 16_384, 6, 64, 2048, 1408
DENSE = {
    "shared gate and up": (5632, 2048),
    "shared down": (2048, 2816),
    "queries": (3072, 2048),
    "dense down": (2048, 10944),
}
_REPEATS, _QUEUED = 5, 6


def milliseconds(run: Callable[[], object]) -> float:
    """Milliseconds of one call by the device's clock, with the host ahead of the device."""
    for _ in range(2):
        run()
    times = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(4_000_000)
        start.record()
        for _ in range(_QUEUED):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / _QUEUED)
    return statistics.median(times)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def uneven_experts() -> Tensor:
    """Experts of each token [N, K]; the most loaded expert has three times the tokens of the least loaded."""
    share_E = torch.rand(EXPERTS, device="cuda") + 0.5
    return torch.multinomial((share_E / share_E.sum()).expand(TOKENS, EXPERTS), TOP_K)


def grouped() -> list[dict]:
    """JSON rows of the routed experts' grouped matmuls."""
    experts_NK = uneven_experts()
    counts_E = torch.bincount(experts_NK.flatten(), minlength=EXPERTS)
    permutation = permutation_by_expert(experts_NK, counts_E)
    padded, ends_E = pad_rows(permutation), counts_E.cumsum(0).to(torch.int32)
    found = []
    for name, width, columns in (("gate and up", WIDTH, 2 * INTERMEDIATE), ("down", INTERMEDIATE, WIDTH)):
        x, grad, weight = random(TOKENS, width), random(TOKENS, columns), random(EXPERTS, columns, width)
        rows, transposed = cast_kernels.cast(x, padded.token_P, padded.expert_T)
        _, grad_transposed = cast_kernels.cast(grad, padded.token_P, padded.expert_T)
        operand = cast_kernels.cast_weight(weight)
        x_R, grad_R = x[permutation.token_R], grad[permutation.token_R]
        flops = 2 * TOKENS * TOP_K * width * columns
        runs = {
            ("rows", "fp8"): lambda r=rows, o=operand: gemm_hopper.multiply_rows(*r, *o, padded.expert_T),
            ("rows", "bf16"): lambda r=x_R, w=weight: torch._grouped_mm(r, w.transpose(1, 2), offs=ends_E),
            ("gradient", "fp8"): lambda g=grad_transposed, t=transposed: gemm_hopper.weight_gradients(
                *g, *t, padded.starts_E
            ),
            ("gradient", "bf16"): lambda g=grad_R, r=x_R: torch._grouped_mm(g.t(), r, offs=ends_E),
        }
        found += [_row(f"experts' {name}", kind, precision, run, flops) for (kind, precision), run in runs.items()]
    return found


def dense() -> list[dict]:
    """JSON rows of some projections' matmuls."""
    found = []
    zeros = torch.zeros(TOKENS // 128, dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, TOKENS // 128], dtype=torch.int32, device="cuda")
    for name, (columns, width) in DENSE.items():
        x, grad, weight = random(TOKENS, width), random(TOKENS, columns), random(columns, width)
        (rows, transposed), (_, grad_transposed) = cast_kernels.cast(x), cast_kernels.cast(grad)
        operand = cast_kernels.cast_weight(weight[None])
        flops = 2 * TOKENS * width * columns
        runs = {
            ("rows", "fp8"): lambda r=rows, o=operand: gemm_hopper.multiply_rows(*r, *o, zeros),
            ("rows", "bf16"): lambda r=x, w=weight: r @ w.t(),
            ("gradient", "fp8"): lambda g=grad_transposed, t=transposed: gemm_hopper.weight_gradients(*g, *t, starts),
            ("gradient", "bf16"): lambda g=grad, r=x: g.t() @ r,
        }
        found += [_row(name, kind, precision, run, flops) for (kind, precision), run in runs.items()]
    return found


def casts() -> list[dict]:
    """JSON rows of the quantization casts, with the bytes that they move."""
    experts_NK = uneven_experts()
    padded = pad_rows(permutation_by_expert(experts_NK, torch.bincount(experts_NK.flatten(), minlength=EXPERTS)))
    x, weight = random(TOKENS, WIDTH), random(EXPERTS, 2 * INTERMEDIATE, WIDTH)
    places = len(padded.token_P)
    h, grad, scale = random(places, 2 * INTERMEDIATE), random(places, INTERMEDIATE), torch.rand(places, device="cuda")
    routed = TOKENS * TOP_K * INTERMEDIATE
    runs = {
        "tokens": (lambda: cast_kernels.cast(x), 4 * x.numel()),
        "tokens to experts": (lambda: cast_kernels.cast(x, padded.token_P, padded.expert_T), 4 * TOP_K * x.numel()),
        "weights": (lambda: cast_kernels.cast_weight(weight), 3 * weight.numel()),
        "weights turned round": (lambda: cast_kernels.cast_weight(weight, transposed=True), 3 * weight.numel()),
        "gated activation": (lambda: cast_kernels.swiglu(h, scale, padded.expert_T), 5 * routed),
        "its gradient": (lambda: cast_kernels.swiglu_backward(h, scale, padded.expert_T, grad), 11 * routed),
    }
    rows = []
    for name, (run, moved) in runs.items():
        ms = milliseconds(run)
        rows.append({"cast": name, "ms": round(ms, 3), "tbs": round(moved / ms / 1e9, 2)})
    return rows


def _row(name: str, kind: str, precision: str, run: Callable[[], object], flops: int) -> dict:
    ms = milliseconds(run)
    return {"matmul": name, "kind": kind, "precision": precision, "ms": round(ms, 3), "tflops": round(flops / ms / 1e9)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="append the rows to this file of JSON lines too")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = {
        "gpu": torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__},
        "command": "python -m benchmarks.fp8_matmuls " + " ".join(sys.argv[1:]),
    }
    for measure in (grouped, dense, casts):
        for row in measure():
            print(json.dumps({**row, **about}), flush=True)
            if options.output:
                with Path(options.output).open("a") as file:
                    file.write(json.dumps({**row, **about}) + "\n")


if __name__ == "__main__":
    main()
