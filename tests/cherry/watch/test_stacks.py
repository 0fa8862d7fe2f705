"""Stacks of a hang: what each rank wrote since, main threads at one place together, the odd ones first."""

from __future__ import annotations

from cherry.watch.stacks import keep_stacks, log_sizes

WAITS = """Thread 0x00007f{0}01 (most recent call first):
  File "threading.py", line {0} in wait

Current thread 0x00007f{0}02 (most recent call first):
  File "cherry/trainer.py", line 9 in _sum_over_ranks
"""
READS = """Current thread 0x00007f9902 (most recent call first):
  File "cherry/data/batches.py", line 5 in take
"""


def test_ranks_at_one_place_stand_together_and_the_odd_ones_first(tmp_path):
    for rank in range(5):
        (tmp_path / f"rank-{rank}.log").write_text(f"a line of rank {rank}\n{READS}")
    before = log_sizes(tmp_path)
    assert before.keys() == set(range(5))
    for rank in (0, 1, 2):
        with (tmp_path / f"rank-{rank}.log").open("a") as log:
            log.write(f"2026-11-30 INFO cherry: a line\n{WAITS.format(rank)}")
    with (tmp_path / "rank-3.log").open("a") as log:
        log.write(READS)
    kept = keep_stacks(tmp_path, before, 5, "the job hangs: no step for 30 s")
    head, *parts = kept.read_text().split("\n===== ")
    assert head.endswith("the job hangs: no step for 30 s\n")
    assert [part.split(" =====")[0] for part in parts] == ["rank 3", "rank 4", "ranks 0 to 2"]
    assert "batches.py" in parts[0] and "0x" not in parts[0]
    assert "no stack came" in parts[1]
    assert parts[2].count("most recent call first") == 2 and "a line" not in parts[2]
