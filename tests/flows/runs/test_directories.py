"""Which directories are runs, and what is said of a name that is none."""

import pytest

from base.errors import MissingFileError
from flows.runs.directories import find_run, run_directories


def test_runs_come_newest_first_without_what_is_hidden(make_run, tmp_path):
    for name in ("old", "new", ".old.removed-1", "_store"):
        make_run(name)
    (tmp_path / "runs" / "serving").mkdir()
    assert [path.name for path in run_directories(tmp_path / "runs")] == ["new", "old"]
    assert run_directories(tmp_path / "none") == []


def test_a_name_that_is_no_run_is_answered_with_similar_ones(make_run, tmp_path):
    make_run("prefect-a")
    make_run("prefect-b")
    assert find_run(tmp_path / "runs", "prefect-a").name == "prefect-a"
    with pytest.raises(MissingFileError, match=r"Did you mean prefect-(a|b) or prefect-(a|b)\?"):
        find_run(tmp_path / "runs", "prefect")
    with pytest.raises(MissingFileError, match="`cherry status` lists the runs"):
        find_run(tmp_path / "runs", "../x")
