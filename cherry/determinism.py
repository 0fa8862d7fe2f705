"""Deterministic training: the same job on the same GPUs gives the same bits, run after run."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from base.errors import ConfigError

# cuBLAS is deterministic with a fixed workspace only; torch's documentation of use_deterministic_algorithms names two.
_CUBLAS_WORKSPACE = ":4096:8"
# How torch words an operator without a deterministic kernel, and a cuBLAS workspace that is not fixed; it has no type.
_NO_KERNEL = " does not have a deterministic implementation"
_NO_WORKSPACE = "Deterministic behavior was enabled"


def use_deterministic_algorithms(seed: int, rank: int) -> None:
    """Seed this process's random generators, and let torch run deterministic kernels only; before CUDA is used.

    Args:
        rank: added to the seed, so that dropout differs between ranks.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def determinism_error(error: RuntimeError) -> ConfigError | None:
    """The configuration error that says which operator has no deterministic kernel; `None` for any other error."""
    text = str(error)
    if _NO_KERNEL in text:
        operator = text.partition(_NO_KERNEL)[0].rpartition(" ")[2]
        return ConfigError(
            f"train.deterministic is true, and {operator} has no deterministic kernel here. Set train.deterministic to "
            "false, or turn off what uses this operator (the traceback in this rank's log shows it)."
        )
    if text.startswith(_NO_WORKSPACE):
        got = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        return ConfigError(
            f"train.deterministic is true, and CUBLAS_WORKSPACE_CONFIG is {got!r}, with which cuBLAS is not "
            f"deterministic. Unset it, or set it to {_CUBLAS_WORKSPACE}."
        )
    return None
