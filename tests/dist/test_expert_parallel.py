"""Expert parallel dispatch and combine equal the experts on one rank: under skew, and with nothing to send."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("ranks", "on_node"), [(3, 3), (4, 2), (3, 1)])
def test_expert_parallel_outputs_and_gradients_equal_those_of_one_rank(tmp_path, run_together, ranks, on_node):
    program = str(Path(__file__).with_name("expert_parallel_rows.py"))
    each = [sys.executable, program, str(tmp_path / "store")]
    run_together([[*each, str(rank), str(ranks), str(on_node)] for rank in range(ranks)])
