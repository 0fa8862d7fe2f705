"""Measures a training step: tokens/s, step time, MFU and peak memory of cherry's own path, with random tokens.

    python -m benchmarks.train_speed [--size tiny|3b] [--steps N] [--compile] [--output FILE]

`tiny` is the preset (16 x 256 tokens a step); `3b` has DeepSeek-V2-Lite's widths in 1 dense and 5 mixture layers (4 x
4096 tokens a step, fp32 parameters, bf16 compute, fused AdamW, clip 1.0, no recompute) and needs a GPU. One JSON row
each.
"""

import argparse
import json
import os
import statistics
import sys
import time
from datetime import date

import torch
import torch.distributed as dist

from cherry import sharding
from cherry.config import ParallelConfig, TrainConfig
from cherry.metrics import MFU_CONVENTION, peak_flops
from cherry.optimizer import build_optimizer, clip_gradients, update_expert_bias
from cherry.trainer import TrainingModel
from model.config import PRESETS, ModelConfig
from model.transformer import Block, DeepseekV3

SLICE_3B = {**PRESETS["16b"], "num_hidden_layers": 6, "rope_scaling": None, "max_position_embeddings": 4096}
SIZES = {"tiny": (PRESETS["tiny"], 16, 256), "3b": (SLICE_3B, 4, 4096)}


def build(config: ModelConfig, train: TrainConfig, device: torch.device) -> tuple[DeepseekV3, TrainingModel]:
    with torch.device("meta"):
        model = DeepseekV3(config)
        network = TrainingModel(model, train.loss_chunk_tokens)
    if train.compile:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
    mesh = sharding.build_mesh(ParallelConfig(), device)
    sharding.shard_model(network, mesh, train.precision)
    network.to_empty(device=device)
    sharding.initialize(model, seed=0)
    return model, network.train()


def measure(size: str, steps: int, *, compiled: bool) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    row = {"what": f"train step, {size}" + (", compiled" if compiled else ""), "device": name}
    if size == "3b" and device.type == "cpu":
        return {**row, "skipped": "needs a GPU: 3.43 billion parameters"}
    shape, batch, length = SIZES[size]
    config = ModelConfig.model_validate(shape)
    precision = "bf16" if device.type == "cuda" else "fp32"
    train = TrainConfig(precision=precision, compile=compiled, loss_chunk_tokens=4096)
    model, network = build(config, train, device)
    optimizer = build_optimizer(model, train)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (steps, batch, length + 1), generator=generator)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for batch_tokens in tokens:
        batch_tokens = batch_tokens.to(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss, mtp_loss, balance = network(batch_tokens[:, :-1].contiguous(), batch_tokens[:, 1:].contiguous())
        count = batch * length
        (loss / count + train.mtp_loss_weight * mtp_loss / count + train.balance_loss_weight * balance).backward()
        clip_gradients(network, train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_expert_bias(model.moe_layers(), train.expert_bias_update_rate)
        losses.append(loss.item() / count)  # also waits for the device
        seconds.append(time.perf_counter() - started)
    step_s = statistics.median(seconds[max(3, steps // 4) :])
    tok_s = batch * length / step_s
    flops = config.flops_per_token(length, with_mtp=True)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        **row,
        "precision": precision,
        "tok_s": round(tok_s, 1),
        "step_ms": round(1000 * step_s, 2),
        "mfu": round(tok_s * flops / peak_flops(device, precision), 4),
        "mfu_convention": MFU_CONVENTION,
        "peak_gib": None if peak is None else round(peak, 2),
        "parameters": config.parameters(with_mtp=True),
        "tokens_per_step": batch * length,
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="compile each block")
    parser.add_argument("--output", help="append the rows to this file too")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    about = {
        "date": date.today().isoformat(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "command": "python -m benchmarks.train_speed " + " ".join(sys.argv[1:]),
    }
    for size in SIZES if options.size == "all" else [options.size]:
        row = json.dumps({**measure(size, options.steps, compiled=options.compile), **about})
        print(row, flush=True)
        if options.output:
            with open(options.output, "a") as handle:
                handle.write(row + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
