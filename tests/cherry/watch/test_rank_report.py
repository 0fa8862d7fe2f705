"""Reports of ranks: the newest of each, of the ranks that the job has now, damaged ones left out."""

from __future__ import annotations

from dataclasses import replace

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
    assert read_reports(tmp_path, range(3)) == [REPORT]
