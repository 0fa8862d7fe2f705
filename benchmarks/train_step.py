"""Measures a training step of a DeepSeek-V3-architecture model: cherry, transformers and torchtitan.

    python -m benchmarks.train_step [--size tiny|3b] [--impl NAME ...] [--steps N] [--output FILE]
                                    [--nproc N [--layout NAME ...]]

All of them build a model of the same sizes, train on the same random tokens in the same process, one after the other,
and print one JSON row each. `3b` has DeepSeek-V2-Lite's widths in 1 dense and 5 MoE layers (3.43 B parameters, 4 x
4,096 tokens a step) and needs a GPU: fp32 parameters with bf16 compute under FSDP2 on a mesh of one, AdamW with fp32
moments, clip 1.0, no recompute. `tiny` is the preset without its MTP module (16 x 256 tokens). `cherry-fp8` trains as
DeepSeek does, with fp8 matmuls and bf16 moments, on Hopper GPUs. `cherry-eager` and `transformers-eager` are without
torch.compile; torchtitan runs where it is installed, and needs a GPU.

With `--nproc` as many GPUs of this host take part, each with its own 4 x 4,096 tokens, and each of cherry's rows comes
once for every `--layout`: `shard` (FSDP2), `kept` (the same with parameters kept gathered), `expert` and `expert, kept`
(routed experts spread over all GPUs), `replicate`. Peers are sharded by FSDP2. `tok_s` is of one GPU; `of_one_gpu` is
its share of what the same implementation reaches alone, measured first in the same call. Three more steps are profiled:
`exposed_comm_ms` is communication while nothing else runs, `idle_ms` the time without any kernel.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpu_time import profiled
from benchmarks.peers import BETAS, CLIP, DECAY, RATE, Step, build_torchtitan, build_transformers
from cherry.distributed.fsdp_hooks import install
from cherry.distributed.peer_memory import held_bytes
from cherry.job_config import JobConfig
from cherry.metrics import MFU_CONVENTION, peak_flops
from cherry.optim.build import set_learning_rate
from cherry.optim.expert_bias import update_expert_bias
from cherry.training_model import build
from model.model_config import PRESETS, ModelConfig

SLICE_3B = {**PRESETS["16b"], "num_hidden_layers": 6, "rope_scaling": None, "max_position_embeddings": 4096}
_ONE_GPU = "CHERRY_BENCHMARK_ONE_GPU"
KEPT = {"reshard_after_forward": False}
LAYOUTS: dict[str, Callable[[int], dict]] = {
    "shard": lambda _: {},
    "kept": lambda _: KEPT,
    "expert": lambda ranks: {"expert": ranks},
    "expert, kept": lambda ranks: {"expert": ranks, **KEPT},
    "replicate": lambda ranks: {"replicate": ranks},
    "replicate, kept": lambda ranks: {"replicate": ranks, **KEPT},
}
SIZES = {
    # The router that all three implement: sigmoid scores.
    "3b": ({**SLICE_3B, "scoring_func": "sigmoid", "norm_topk_prob": True}, 4, 4096),
    "tiny": ({**PRESETS["tiny"], "num_nextn_predict_layers": 0, "n_group": 1}, 16, 256),
}


def job_of(
    config: ModelConfig,
    device: torch.device,
    *,
    compiled: bool,
    chunk: int,
    parallel: dict | None = None,
    **changes: str,
) -> JobConfig:
    """Job configuration, as the trainer gets it; `changes` are keys of `train`."""
    train = {
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "compile": compiled,
        "loss_chunk_tokens": chunk,
        "learning_rate": RATE,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "weight_decay": DECAY,
        **changes,
    }
    return JobConfig.model_validate(
        {
            "name": "bench",
            "model": config.model_dump(),
            "train": train,
            "data": {"tokenizer": "none"},
            "parallel": parallel or {},
            "launch": {"nproc_per_node": dist.get_world_size()},
        }
    )


def warm_rates(warmup_steps: int) -> Iterator[float]:
    """Learning rate of every step."""
    return (RATE * min(1.0, step / max(1, warmup_steps)) for step in itertools.count(1))


def build_cherry(
    config: ModelConfig,
    device: torch.device,
    *,
    compiled: bool,
    chunk: int,
    warmup_steps: int = 0,
    parallel: dict | None = None,
    **changes: str,
) -> Step:
    """Training step of the trainer, without data loading and metrics; the learning rate warms up, then stays."""
    job = job_of(config, device, compiled=compiled, chunk=chunk, parallel=parallel, **changes)
    network = build(job, device)
    ranks = dist.get_world_size()
    network.start(install(network.module, job.communication))
    rates = warm_rates(warmup_steps)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        set_learning_rate(network.optimizer, next(rates))
        loss, _, balance = network.module(tokens, targets)
        mean = loss / (tokens.numel() * ranks)  # gradients are summed over ranks
        (mean + job.train.balance_loss_weight * balance).backward()
        norm = network.gradient_norm()
        take = network.ready_step(norm, CLIP)
        # The trainer checks loss and norm before the optimizer step: its wait for them is part of the time.
        figures = torch.stack([mean.detach(), norm.to(mean.device)]).tolist()
        assert all(map(math.isfinite, figures))
        take()
        update_expert_bias(network.model.moe_layers(), job.train.expert_bias_update_rate)
        network.zero_grad()
        return mean.detach() * ranks

    return step


def builders(chunk: int, parallel: dict | None = None) -> dict[str, Callable[[ModelConfig, torch.device], Step]]:
    """Implementations that can run here, by name."""
    found: dict[str, Callable[[ModelConfig, torch.device], Step]] = {
        "cherry": lambda c, d: build_cherry(c, d, parallel=parallel, compiled=d.type == "cuda", chunk=chunk),
        "cherry-eager": lambda c, d: build_cherry(c, d, parallel=parallel, compiled=False, chunk=chunk),
        "transformers": lambda c, d: build_transformers(c, d, compiled=d.type == "cuda")[1],
        "transformers-eager": lambda c, d: build_transformers(c, d, compiled=False)[1],
    }
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        # As DeepSeek-V3 trains: fp8 matmuls, bf16 moments.
        deepseek = {"precision": "fp8", "optimizer_state_dtype": "bf16"}
        found["cherry-fp8"] = lambda c, d: build_cherry(c, d, parallel=parallel, compiled=True, chunk=chunk, **deepseek)
        found["cherry-fp8, fp32 moments"] = lambda c, d: build_cherry(
            c, d, parallel=parallel, compiled=True, chunk=chunk, precision="fp8"
        )
        moments = {"optimizer_state_dtype": "bf16"}
        found["cherry, bf16 moments"] = lambda c, d: build_cherry(
            c, d, parallel=parallel, compiled=True, chunk=chunk, **moments
        )
    if importlib.util.find_spec("torchtitan") and torch.cuda.is_available():
        found["torchtitan"] = lambda c, d: build_torchtitan(c, d, compiled=True)[1]
    return found


def measure(
    name: str, size: str, steps: int, chunk: int | None, shape: dict | None = None, layout: str = "shard"
) -> dict:
    """JSON row of one measurement. `shape` overrides keys of the size's model, `batch` and `length`."""
    local_rank, ranks = int(os.environ.get("LOCAL_RANK", 0)), dist.get_world_size()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    cuda = device.type == "cuda"
    keys, batch, length = SIZES[size]
    changes = dict(shape or {})
    batch, length = changes.pop("batch", batch), changes.pop("length", length)
    config = ModelConfig.model_validate({**keys, **changes})
    row = {
        "impl": name,
        "size": size,
        "precision": ("fp8" if "fp8" in name else "bf16") if cuda else "fp32",
        "gpu": torch.cuda.get_device_name() if cuda else f"none: CPU, {os.cpu_count()} cores",
        "batch": batch,
        "length": length,
        "experts": config.n_routed_experts,
        "layout": layout,
        "world": ranks,
    }
    if cuda:
        torch.set_float32_matmul_precision("high")  # as in cherry: only the routers stay in fp32
        torch.cuda.reset_peak_memory_stats()
    try:
        torch.manual_seed(0)
        step = builders(chunk or batch * length, LAYOUTS[layout](ranks) if ranks > 1 else None)[name](config, device)
        seconds, losses = _run(step, config, steps, batch, length, device)
        peak = torch.cuda.max_memory_allocated() + held_bytes() if cuda else 0
        lost = _profiled(step, config, batch, length, device) if ranks > 1 and cuda else {}
    except torch.OutOfMemoryError:
        return {**row, "failed": "out of memory"}
    step_s = statistics.median(seconds[min(4, steps // 3) :])
    tok_s = batch * length / step_s
    flops = config.flops_per_token(length)
    return {
        **row,
        "tok_s": round(tok_s, 1),
        "step_ms": round(1000 * step_s, 2),
        "mfu": round(tok_s * flops / peak_flops(device, row["precision"]), 4),
        "mfu_convention": MFU_CONVENTION,
        **lost,
        "peak_gib": round(peak / 2**30, 2) if cuda else None,
        "parameters": config.parameters(),
        "first_step_s": round(seconds[0], 1),
        "loss": round(losses[-1], 4),
    }


def _run(
    step: Step, config: ModelConfig, steps: int, batch: int, length: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds from the end of each step to the end of the next, by the device's clock, and the losses.

    No step waits for the previous one to end; only the implementation's own synchronization is in its time.
    """
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(config.vocab_size, (steps, batch, length + 1), generator=generator).to(device)
    ends, losses = [_now(device)], []
    for batch_tokens in tokens:
        losses.append(step(batch_tokens[:, :-1].contiguous(), batch_tokens[:, 1:].contiguous()))
        ends.append(_now(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [_between(*pair) for pair in itertools.pairwise(ends)], [loss.item() for loss in losses]


def _profiled(step: Step, config: ModelConfig, batch: int, length: int, device: torch.device) -> dict[str, float]:
    """Exposed communication and idle time of a step, in ms."""
    tokens = torch.randint(config.vocab_size, (batch, length), device=device)
    return profiled(lambda: step(tokens, tokens), 3)._asdict()


def _now(device: torch.device) -> torch.cuda.Event | float:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, float):
        return end - start
    return start.elapsed_time(end) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="3b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--impl", nargs="+", help="cherry, cherry-eager, transformers, transformers-eager, torchtitan")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--chunk", type=int, help="tokens whose logits exist at one time (default: all of a step's)")
    parser.add_argument("--scale", action="store_true", help="cherry over sequence lengths, experts and micro-batches")
    parser.add_argument("--output", help="append the rows to this JSON array too")
    parser.add_argument("--nproc", type=int, default=1, help="GPUs of this host that take part (default: 1)")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["shard"], help="of cherry on several GPUs")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if options.nproc > 1 and "RANK" not in os.environ:
        raise SystemExit(_start_ranks(options.nproc))
    _join(cuda=cuda)
    world = ["--nproc", str(dist.get_world_size())] if dist.get_world_size() > 1 else []
    about = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "torchtitan") if _installed(name)},
        "command": shlex.join(["python", "-m", "benchmarks.train_step", *_without_output(sys.argv[1:]), *world]),
    }
    names = options.impl or (list(builders(1)) if cuda else ["cherry", "transformers"])
    layouts = options.layout if world else ["shard"]
    shapes: list[dict] = [{}]
    if options.scale:
        names = options.impl or ["cherry"]
        shapes = [{"length": n, "batch": 16384 // n} for n in (1024, 2048, 4096, 8192, 16384)]
        shapes = [{**s, "max_position_embeddings": 16384} for s in shapes]
        shapes += [{"n_routed_experts": n} for n in (16, 32, 128)] + [{"batch": n} for n in (1, 2)]
    for shape in shapes:
        for name, layout in itertools.product(names, layouts):
            if layout != layouts[0] and "cherry" not in name:
                continue  # peers have one
            layout = layout if "cherry" in name else "shard"
            row = {**measure(name, options.size, options.steps, options.chunk, shape, layout), **about}
            if (alone := _alone().get(name)) and "tok_s" in row:
                row["of_one_gpu"] = round(row["tok_s"] / alone, 4)
            if dist.get_rank() == 0:
                print(json.dumps(row), flush=True)
                if options.output:
                    _keep(row, Path(options.output))
            gc.collect()
            torch._dynamo.reset()
            if cuda:
                torch.cuda.empty_cache()
    dist.destroy_process_group()


def _start_ranks(ranks: int) -> int:
    """Run this command on one GPU, then on several beside that; the exit code."""
    place = sys.argv.index("--nproc")  # torchrun would take it for its own
    own = ["-m", "benchmarks.train_step", *sys.argv[1:place], *sys.argv[place + 2 :]]
    with tempfile.TemporaryDirectory(prefix="cherry-train-step-") as folder:
        rows = Path(folder, "one.json")
        code = subprocess.run([sys.executable, *own, "--output", str(rows)], check=False).returncode
        if code:
            return code
        _copy_rows(rows)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = {**os.environ, _ONE_GPU: str(rows)}
        return subprocess.run([sys.executable, *launcher, *own], env=environment, check=False).returncode


def _without_output(arguments: list[str]) -> list[str]:
    """Arguments that change what is measured."""
    if "--output" not in arguments:
        return arguments
    place = arguments.index("--output")
    return _without_output(arguments[:place] + arguments[place + 2 :])


def _copy_rows(rows: Path) -> None:
    """Keep the rows of one GPU where those of several go."""
    if "--output" in sys.argv:
        target = Path(sys.argv[sys.argv.index("--output") + 1])
        for row in json.loads(rows.read_text()):
            _keep(row, target)


def _alone() -> dict[str, float]:
    """Tokens a second of one GPU by implementation, where this command measured them first."""
    path = os.environ.get(_ONE_GPU)
    return {row["impl"]: row["tok_s"] for row in json.loads(Path(path).read_text()) if "tok_s" in row} if path else {}


def _join(*, cuda: bool) -> None:
    """Join the ranks that `--nproc` started, or make a group of one."""
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)


def _keep(row: dict, path: Path) -> None:
    """Append to a JSON array, a row a line."""
    rows = [*(json.loads(path.read_text()) if path.exists() else []), row]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    main()
