"""Reports of ranks: the newest of each, of the ranks that the job has now, damaged ones left out."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, replace

from cherry.watch.rank_report import RANKS_FOLDER, RankReport, read_job, read_reports

REPORT = RankReport(rank=0, ranks=2, host="node1", step=3, time=5.0, step_seconds=0.5, own_seconds=None)


def test_the_newest_report_of_each_rank_of_the_job_is_read(tmp_path):
    assert read_job(tmp_path) == []
    second = replace(REPORT, rank=1, host="node2", own_seconds=0.25)
    for report in (REPORT, replace(REPORT, step=4), second, replace(REPORT, rank=2, ranks=3)):
        report.write(tmp_path)
    assert read_job(tmp_path) == [replace(REPORT, step=4), second]
    assert [path.suffix for path in (tmp_path / RANKS_FOLDER).iterdir()] == [".json"] * 3


def test_a_report_that_cannot_be_read_counts_as_none(tmp_path):
    REPORT.write(tmp_path)
    (tmp_path / RANKS_FOLDER / "1.json").write_text('{"rank": 1, "ra')
    (tmp_path / RANKS_FOLDER / "2.json").write_text('{"rank": 2}')
    (tmp_path / RANKS_FOLDER / "3.json").write_bytes(b"\x80\x00")
    (tmp_path / RANKS_FOLDER / "4.json").write_text("[" * 100_000)
    (tmp_path / RANKS_FOLDER / "5.json").write_text(json.dumps({**asdict(REPORT), "time": "now"}))
    assert read_reports(tmp_path, range(6)) == [REPORT]


def test_a_damaged_number_of_ranks_costs_no_time(tmp_path):
    replace(REPORT, ranks=10**15).write(tmp_path)
    for name in ("1", "x", "\u00b2", "9" * 5000):
        with suppress(OSError):  # a name that is too long
            (tmp_path / RANKS_FOLDER / f"{name}.json").write_text("{}")
    assert [one.rank for one in read_job(tmp_path)] == [0]
