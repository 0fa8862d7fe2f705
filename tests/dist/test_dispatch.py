"""Rows that travel to their experts and back give what they give at home: under skew, and with nothing to send."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_spread_experts_compute_and_learn_what_experts_at_home_do(tmp_path, run_together):
    program = str(Path(__file__).with_name("dispatch_rows.py"))
    run_together([[sys.executable, program, str(tmp_path / "store"), str(rank), "3"] for rank in range(3)])
