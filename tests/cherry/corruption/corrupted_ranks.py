"""Trains on two ranks of which one computes wrongly once, and writes down what was found.

python corrupted_ranks.py FOLDER RANK, where FOLDER/cases.json maps a case's name to {config, directory, set}.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from base.config import load
from base.errors import HardwareError, error_of_record, error_record
from cherry.job_config import JobConfig
from cherry.trainer import Trainer

WRONG_RANK = 1
# The top bit of an fp32 exponent: a value below 1 becomes 2^128 times as large.
BIT = 1 << 30


def flip(x: Tensor) -> Tensor:
    """`x` with one bit of its largest element below 1 flipped, which becomes far larger than all others."""
    flipped = x.detach().clone()
    place = torch.where(flipped.abs() < 1, flipped.abs(), 0.0).argmax()
    flipped.view(-1).view(torch.int32)[place] ^= BIT
    return flipped


def flip_output(module: nn.Module) -> None:
    """Flip a bit of the module's next output, once."""

    def once(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        handle.remove()
        return output + (flip(output) - output).detach()

    handle = module.register_forward_hook(once)


def flip_weight_gradient(module: nn.Module) -> None:
    """Flip a bit of this rank's gradient of the module's weight in the next backward pass, once."""

    def in_forward(inner: nn.Module, _: Any) -> None:
        handle.remove()
        assert isinstance(inner.weight, Tensor)
        of_gradient = inner.weight.register_hook(lambda gradient: (of_gradient.remove(), flip(gradient))[1])

    handle = module.register_forward_pre_hook(in_forward)


def expect(trainer: Trainer, loss: float, norm: float) -> None:
    """Have the guard take steps around this loss and norm for usual."""
    usual = {"losses": [loss * 0.9, loss * 1.1] * 32, "grad_norms": [norm * 0.5, norm * 1.5] * 32}
    trainer.guard.restore({**usual, "skipped": 0, "in_a_row": 0})


def spoil(trainer: Trainer, how: str) -> None:
    """Prepare the fault of a case, before its step."""
    if how == "data":
        expect(trainer, 1e-3, 1e-3)
    elif dist.get_rank() == WRONG_RANK and how == "activation":
        flip_output(trainer.model.norm)  # right before the head: no later norm scales it down
    elif dist.get_rank() == WRONG_RANK:
        flip_weight_gradient(trainer.model.get_submodule("layers.0.self_attn.o_proj"))


def outcome(trainer: Trainer, run: Callable[[], Any]) -> dict[str, Any]:
    """What a run ended with: its error as it crosses a process, and its last record."""
    try:
        run()
    except HardwareError as error:
        crossed = error_of_record(json.loads(json.dumps(error_record(error))))
        assert isinstance(crossed, HardwareError)
        return {"error": str(crossed), "hosts": crossed.hosts, "exit_code": crossed.exit_code}
    return {"error": None, "skipped_steps": trainer.guard.skipped, "steps": trainer.progress.step}


def run_case(config: JobConfig, directory: str, name: str) -> dict[str, Any]:
    """Train two steps well, then one that is spoiled as its case says, then on to the end."""
    trainer, how = Trainer(config, directory), name.split("-")[0]
    if name.endswith("inexact"):  # as on a GPU whose kernels may add in another order each time
        trainer.recheck._exact = False
    try:
        if how == "self_check":
            hook = trainer._self_check()
            assert hook is not None and hook.check(1) is None
            if dist.get_rank() == WRONG_RANK:
                hook._inputs[0].copy_(flip(hook._inputs[0]))
            error = hook.check(2)
            return {"error": str(error), "hosts": getattr(error, "hosts", None), "seconds": measure(hook)}
        trainer._step()
        record = trainer._step()
        assert record.loss is not None and record.grad_norm is not None
        expect(trainer, record.loss, record.grad_norm)
        spoil(trainer, how)
        return outcome(trainer, trainer.run)
    finally:
        trainer.close()


def measure(hook: Any) -> float:
    """Seconds of one self-check's workload."""
    started = torch.utils.benchmark.Timer("compute()", globals={"compute": hook.compute}).timeit(3)
    return float(started.median)


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    backend = "gloo"
    if torch.cuda.device_count() >= 2:  # as the ranks of a launcher find them
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        config = load(case["config"], JobConfig, [*case["set"], "launch.nproc_per_node=2", "train.steps=4"])
        found = run_case(config, case["directory"], name)
        (folder / f"{name}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    import torch.utils.benchmark

    main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # as cherry/rank_main.py does
