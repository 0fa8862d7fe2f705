"""What the selection bias is for: on a corpus that skews the router, experts end up evenly loaded with it alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_selection_bias_balances_what_the_corpus_skews(tmp_path: Path, environment: dict[str, str]) -> None:
    output = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.load_balance", "--output", str(output)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    off, on = map(json.loads, output.read_text().splitlines())
    assert off["bias_update_rate"] == 0.0
    assert off["load_first"] == on["load_first"] > 2.0  # the same model meets the same skew
    assert off["load_least"] > 2.0
    assert on["load"] < 1.3
    assert on["heldout_loss"] < 1.02 * off["heldout_loss"]  # balance is not paid for in quality
