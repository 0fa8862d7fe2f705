"""Bandwidth of an all-reduce over all ranks, which proves that every host reaches every other one.

    cherry-launch --nnodes=2 ... -m cherry.remote.all_reduce

Rank 0 prints a line a size, and reports it as `figures` to the one who started it (base/progress.py).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

from base.errors import CherryError, HardwareError, run_program
from base.progress import report_figures
from cherry.launcher import LAUNCHER_PID, die_with_parent
from cherry.rank_main import classify_error, set_network_variables, write_for_launcher

_MIB = 1 << 20
# From where latency counts to where bandwidth does; NCCL reaches its bandwidth at some hundred MiB.
_SIZES = {"cuda": (_MIB, 32 * _MIB, 512 * _MIB), "cpu": (_MIB // 16, _MIB, 8 * _MIB)}
_WARM_UP, _TIMES = 2, 5
_TIMEOUT_S = 60.0


def bandwidths(size_bytes: int, seconds: float, ranks: int) -> tuple[float, float]:
    """Algorithm and bus bandwidth in bytes/s of an all-reduce of so many bytes a rank.

    As nccl-tests define them (doc/PERFORMANCE.md): size over time, and that times 2 (n - 1) / n, which is what the
    busiest link carries whatever the number of ranks.
    """
    algorithm = size_bytes / seconds
    return algorithm, algorithm * 2 * (ranks - 1) / ranks


def main() -> None:
    """Run one rank; ends the process with the error's exit code."""
    if launcher := os.environ.get(LAUNCHER_PID):
        die_with_parent(signal.SIGKILL, int(launcher))
    code = run_program(_run)
    sys.stdout.flush()
    os._exit(code)  # torn-down threads would wait for other ranks


def _run() -> None:
    try:
        set_network_variables()
        _measure()
    except RuntimeError as error:
        classified = classify_error(error)
        if not isinstance(classified, CherryError):
            raise
        write_for_launcher(classified)
        raise classified from error
    except CherryError as error:
        write_for_launcher(error)
        raise


def _measure() -> None:
    import torch
    import torch.distributed as dist

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    timeout = timedelta(seconds=_TIMEOUT_S)
    if kind == "cuda":
        device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    ranks = dist.get_world_size()
    for size in _SIZES[kind]:
        seconds = _seconds(torch.ones(size // 4, device=kind), ranks)
        if dist.get_rank() == 0:
            algorithm, bus = bandwidths(size, seconds, ranks)
            report_figures(bytes=size, seconds=seconds, ranks=ranks, algorithm_bytes_s=algorithm, bus_bytes_s=bus)
            print(f"all-reduce of {size / _MIB:g} MiB over {ranks} ranks: {seconds * 1e3:.2f} ms", flush=True)
    dist.destroy_process_group()


def _seconds(values: Any, ranks: int) -> float:
    """Seconds of an all-reduce on the slowest rank, the mean of some.

    Raises:
        HardwareError: the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    for _ in range(_WARM_UP):
        values.fill_(1.0)
        dist.all_reduce(values)
    if not bool((values == ranks).all()):
        raise HardwareError(f"an all-reduce of ones over {ranks} ranks is not {ranks} on rank {dist.get_rank()}")
    dist.barrier()
    began = time.perf_counter()
    for _ in range(_TIMES):
        dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    taken = torch.tensor([(time.perf_counter() - began) / _TIMES], dtype=torch.float64, device=values.device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


if __name__ == "__main__":
    main()
