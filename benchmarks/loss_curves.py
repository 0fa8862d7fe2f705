"""Measures the difference between the loss curve of the optimized training path and that of plain torch.

    python -m benchmarks.loss_curves [--size tiny|3b] [--steps N] [--curves NAME ...] [--output FILE]

`cherry` is what the trainer runs. `reference` has the same initial weights, data, precision and schedule, but torch's
own operators throughout: experts one after the other by autograd, the cross-entropy of whole fp32 logits, the combine
by index and sum, FSDP2's own copies and casts, torch.optim.AdamW after clip_grad_norm_. On a GPU `reference-again` is
the reference repeated, as the GPU sums in another order each time, and `reference-compiled` the same with its blocks
compiled: the effect of rounding alone. `cherry-bf16-moments` keeps AdamW's moments in bf16; `cherry-fp8` does too and
multiplies in fp8, `cherry-fp8-fp32-moments` has fp8 matmuls and fp32 moments. fp8 needs a Hopper GPU.
The learning rate warms up over all steps, or `--warmup`. The text is drawn from a fixed Markov chain over at most 4,096
tokens, so that there is something to learn. Prints one JSON row: the curves, and the largest and mean relative
difference of each from the first, step by step, and that of the means of the last fifth of the steps. While the loss
falls by percents a step, a curve that is a tenth of a step behind differs by tenths of a percent; the figure of the
last fifth has no such lag.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import BETAS, CLIP, DECAY, RATE, Step
from benchmarks.train_step import SIZES, build_cherry, job_of, warm_rates
from cherry.optim.build import set_learning_rate
from cherry.optim.expert_bias import update_expert_bias
from cherry.training_model import build
from model.model_config import ModelConfig

CHAIN_TOKENS, CHAIN_CHOICES = 4096, 4
_VARIANTS = {
    "cherry-bf16-moments": ("bf16", "bf16"),
    "cherry-fp8": ("fp8", "bf16"),
    "cherry-fp8-fp32-moments": ("fp8", "fp32"),
}


def build_reference(config: ModelConfig, device: torch.device, *, compiled: bool, warmup_steps: int) -> Step:
    """Training step of the same job without this project's kernels."""
    job = job_of(config, device, compiled=compiled, chunk=1)
    network = build(job, device)
    weights = list(network.model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": DECAY},
        {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)

    def cross_entropy(hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden_BTD, weight_VD).flatten(0, 1).float(), targets_BT.flatten()) * (
            targets_BT.numel()
        )

    def sum_topk(rows_RD: Tensor, inverse_NK: Tensor) -> Tensor:
        return rows_RD[inverse_NK].float().sum(1).to(rows_RD.dtype)

    training = next(module for module in network.module.modules() if hasattr(module, "loss_chunk_tokens"))
    training._sum = cross_entropy

    rates = warm_rates(warmup_steps)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        set_learning_rate(optimizer, next(rates))
        plain = patch("model.experts.can_group", lambda *_: False), patch("model.experts.sum_topk", sum_topk)
        with plain[0], plain[1]:
            loss, _, balance = network.module(tokens, targets)
            mean = loss / tokens.numel()
            (mean + job.train.balance_loss_weight * balance).backward()
        update_expert_bias(network.model.moe_layers(), job.train.expert_bias_update_rate)
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return mean.detach()

    return step


def chain(vocab: int, steps: int, batch: int, length: int, device: torch.device) -> Tensor:
    """Token ids [steps, batch, length + 1] of a Markov chain: each token has four possible successors."""
    generator, count = torch.Generator().manual_seed(0), min(vocab, CHAIN_TOKENS)
    followers = torch.randint(count, (count, CHAIN_CHOICES), generator=generator)
    choice = torch.randint(CHAIN_CHOICES, (length + 1, steps * batch), generator=generator)
    columns = [torch.randint(count, (steps * batch,), generator=generator)]
    for drawn in choice[1:]:
        columns.append(followers[columns[-1], drawn])
    return torch.stack(columns, dim=1).view(steps, batch, length + 1).to(device)


def curve(make: Callable[[ModelConfig, torch.device], Step], config: ModelConfig, tokens: Tensor) -> list[float]:
    """Loss of every step, in nats."""
    torch.manual_seed(0)
    step = make(config, tokens.device)
    losses = [step(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]
    result = [float(loss) for loss in losses]
    del step
    gc.collect()
    torch._dynamo.reset()
    if tokens.is_cuda:
        torch.cuda.empty_cache()
    return result


def _makers(cuda: bool, chunk: int, warmup: int) -> dict[str, Callable[[ModelConfig, torch.device], Step]]:
    """Training step of each curve, in the order in which they are measured."""
    made: dict[str, Callable[[ModelConfig, torch.device], Step]] = {
        "reference": partial(build_reference, compiled=False, warmup_steps=warmup),
        "cherry": partial(build_cherry, compiled=cuda, chunk=chunk, warmup_steps=warmup),
    }
    if cuda:
        for name, (precision, moments) in _VARIANTS.items():
            made[name] = partial(
                build_cherry,
                compiled=True,
                chunk=chunk,
                warmup_steps=warmup,
                precision=precision,
                optimizer_state_dtype=moments,
            )
        made["reference-again"] = made["reference"]
        made["reference-compiled"] = partial(build_reference, compiled=True, warmup_steps=warmup)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="3b" if cuda else "tiny")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4 if cuda else 2)
    parser.add_argument("--length", type=int, default=4096 if cuda else 128)
    parser.add_argument("--warmup", type=int, help="steps (default: all)")
    parser.add_argument("--curves", nargs="+", help="which, the first being what others differ from")
    parser.add_argument("--output", help="append the row to this file of JSON lines too")
    options = parser.parse_args()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda" if cuda else "cpu")
    config = ModelConfig.model_validate(SIZES[options.size][0])
    tokens = chain(config.vocab_size, options.steps, options.batch, options.length, device)
    chunk = options.batch * options.length
    made = _makers(cuda, chunk, options.warmup or options.steps)
    curves, last = {}, max(1, options.steps // 5)
    for name in options.curves or made:
        curves[name] = curve(made[name], config, tokens)
        print(f"{name}: {fmean(curves[name][-last:]):.5f} at the end", file=sys.stderr, flush=True)
    base = next(iter(curves))
    expected = curves.pop(base)
    row = {
        "size": options.size,
        "precision": "bf16" if cuda else "fp32",
        "gpu": torch.cuda.get_device_name() if cuda else f"none: CPU, {os.cpu_count()} cores",
        "steps": options.steps,
        "batch": options.batch,
        "length": options.length,
        "largest_relative_difference": {name: max(_differences(losses, expected)) for name, losses in curves.items()},
        "relative_difference_at_the_end": {
            name: fmean(losses[-last:]) / fmean(expected[-last:]) - 1 for name, losses in curves.items()
        },
        "mean_relative_difference": {name: fmean(_differences(losses, expected)) for name, losses in curves.items()},
        "loss": {base: _rounded(expected), **{name: _rounded(losses) for name, losses in curves.items()}},
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__},
        "command": "python -m benchmarks.loss_curves " + " ".join(sys.argv[1:]),
    }
    print(json.dumps(row), flush=True)
    if options.output:
        with Path(options.output).open("a") as file:
            file.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


def _differences(losses: list[float], expected: list[float]) -> list[float]:
    return [abs(a - b) / b for a, b in zip(losses, expected, strict=True)]


def _rounded(losses: list[float]) -> list[float]:
    return [round(loss, 5) for loss in losses]


if __name__ == "__main__":
    main()
