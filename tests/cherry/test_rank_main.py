"""Whose fault an error of torch is: what the world did may be tried again, what a person asked for may not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from base.errors import InvalidInputError, WorkerLostError, is_retryable_exit_code
from cherry.rank_main import _side_of


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."), InvalidInputError, "gradient_accumulation_steps"),
        (dist.DistNetworkError("Connection closed by peer"), WorkerLostError, "connection to another rank broke"),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] reset"), WorkerLostError, "connection"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), WorkerLostError, "GPU failed"),
    ],
)
def test_what_torch_raises_gets_a_side(error: RuntimeError, kind: type[Exception], words: str) -> None:
    told = _side_of(error)
    assert type(told) is kind and words in str(told)
    assert is_retryable_exit_code(told.exit_code) == (kind is WorkerLostError)


def test_a_bug_stays_what_it_is() -> None:
    bug = RuntimeError("shape '[2]' is invalid for input of size 3")
    assert _side_of(bug) is bug
