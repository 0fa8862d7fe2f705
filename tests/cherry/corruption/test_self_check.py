"""The self-check of a device: the same bits each time, and none of its parts may change unseen."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from base.errors import HardwareError
from cherry.corruption.self_check import SelfCheck
from cherry.train_record import TrainRecord


def test_the_workload_gives_the_same_bits_in_every_check_and_in_every_process(group: dist.ProcessGroup) -> None:
    lines: list[str] = []
    check = SelfCheck(2, torch.device("cpu"), lines.append)
    for step in range(1, 5):
        check.on_step_end(TrainRecord(step=step))
    assert SelfCheck(1, torch.device("cpu"), lines.append).compute() == check.compute()
    assert lines == []


def test_a_bit_flipped_in_any_input_is_found_at_the_next_check_that_is_due(group: dist.ProcessGroup) -> None:
    lines: list[str] = []
    check = SelfCheck(10, torch.device("cpu"), lines.append)
    *tensors, experts = check._inputs
    for tensor in [*tensors, *(parameter.data for parameter in experts.parameters())]:
        place = tensor.view(-1)[1:2].view(torch.int32)
        place ^= 1 << 20
        check.on_step_end(TrainRecord(step=9))
        with pytest.raises(HardwareError, match=r"self-check after step 10: .* on rank 0 ") as caught:
            check.on_step_end(TrainRecord(step=10))
        assert lines.pop() == str(caught.value)
        place ^= 1 << 20
        check.on_step_end(TrainRecord(step=10))
