"""Expert parallel dispatch and combine equal the experts on one rank: under skew, and with nothing to send."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from cherry.distributed.expert_parallel import AllToAllDispatcher


@pytest.mark.slow
def test_outputs_and_gradients_on_one_node_equal_those_of_one_rank(check_dispatch: Callable[..., None]) -> None:
    check_dispatch(ranks=3, on_node=3)


def test_a_plan_sorts_the_received_rows_by_expert_and_sends_none_away_on_one_rank(group: dist.ProcessGroup) -> None:
    dispatcher = AllToAllDispatcher(group)
    counts_E = torch.tensor([2, 0, 3])
    plan = dispatcher.plan(counts_E)
    assert (plan.input_splits, plan.output_splits) == ([5], [5])
    assert plan.counts_L.equal(counts_E)
    assert plan.order_Q.tolist() == plan.inverse_Q.tolist() == [0, 1, 2, 3, 4]
    sent: list[int] = []
    dispatcher.count_bytes(sent.append)
    rows_QD = torch.randn(5, 4)
    (received_QD,) = dispatcher.all_to_all(plan.input_splits, plan.output_splits, rows_QD)
    assert received_QD.equal(rows_QD)
    assert sent == [0]
