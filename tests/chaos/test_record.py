"""The table of faults, as it is made of them."""

import json
from pathlib import Path

from benchmarks.chaos.record import Fault, markdown, rows

ROOT = Path(__file__).parents[2]


def kept():
    return json.loads((ROOT / "benchmarks" / "results" / "chaos.json").read_text())


def test_a_row_counts_the_faults_of_one_kind_and_provider():
    first = Fault("cut", "ssh", completed=True, losses_equal=True, steps_repeated=3, detect_s=1.0, recover_s=10.04)
    second = Fault("cut", "ssh", losses_equal=False, data_lost=True, steps_repeated=7, survivors=2, detect_s=4.0)
    other = Fault("cut", "slurm", completed=True)
    row, alone = rows([first, other, second])
    assert row == {
        **{"fault": "cut", "provider": "ssh", "injected": 2, "completed": 1, "losses_equal": 1, "data_lost": 1},
        **{"steps_repeated_max": 7, "survivors": 2, "detect_s_p50": 2.5, "detect_s_max": 4.0, "recover_s_p50": 10.0},
    }
    assert (alone["provider"], alone["losses_equal"], alone["detect_s_max"]) == ("slurm", None, None)
    assert markdown([row, alone]).splitlines()[2:] == [
        "| cut | ssh | 2 | 1 | 1 | 1 | 7 | 2 | 2.5 | 4.0 | 10.0 |",
        "| cut | slurm | 1 | 1 | - | 0 | - | 0 | - | - | - |",
        "| all |  | 3 | 2 | 1 | 1 |  | 2 |  |  |  |",
    ]


def test_the_kept_faults_are_many_and_lost_nothing():
    assert sum(row["injected"] for row in kept()) >= 200
    for row in kept():
        assert row["completed"] == row["injected"], row
        assert row["losses_equal"] in (None, row["injected"]), row
        assert (row["data_lost"], row["survivors"]) == (0, 0), row


def test_the_document_has_the_kept_table():
    assert markdown(kept()) in (ROOT / "docs" / "chaos.md").read_text()
