"""Starts of a SkyPilot job are counted beside its checkpoints, and end when they bring none."""

from __future__ import annotations

import pytest

from base import storage
from base.errors import ConfigError, InvalidInputError
from cherry.sky.start import STARTS_FILE, TASK_VARIABLE, begin


def commit(directory, step):
    """A committed checkpoint, which is all that its step needs to count."""
    folder = directory / f"step_{step}"
    folder.mkdir(parents=True)
    storage.commit(str(folder), {"step": step})


def test_a_job_ends_after_so_many_starts_without_a_new_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(TASK_VARIABLE, "job-1")
    begin(str(tmp_path), 2)
    begin(str(tmp_path), 2)
    with pytest.raises(InvalidInputError, match=r"started 2 times \(sky\.starts\) without a new checkpoint") as caught:
        begin(str(tmp_path), 2)
    assert caught.value.exit_code == 10  # not one of those that SkyPilot starts a job again after
    commit(tmp_path, 20)
    begin(str(tmp_path), 2)
    assert capsys.readouterr().out.splitlines() == [
        *("start 1 since the beginning", "start 2 since the beginning", f"start 1 since {tmp_path}/step_20"),
    ]


def test_a_job_that_is_submitted_again_begins_to_count_anew(tmp_path, monkeypatch):
    for job in ("job-1", "job-2", "job-1"):
        monkeypatch.setenv(TASK_VARIABLE, job)
        begin(str(tmp_path), 1)


@pytest.mark.parametrize("left", ["", "[]", '{"job": "job-1", "newest": null}'])
def test_a_record_that_was_cut_short_counts_for_nothing(left, tmp_path, monkeypatch):
    monkeypatch.setenv(TASK_VARIABLE, "job-1")
    (tmp_path / STARTS_FILE).write_text(left)
    begin(str(tmp_path), 1)
    assert storage.read_json(str(tmp_path / STARTS_FILE)) == {"job": "job-1", "newest": None, "starts": 1}


def test_starts_that_cannot_be_counted_are_none(tmp_path, monkeypatch):
    monkeypatch.delenv(TASK_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="SKYPILOT_TASK_ID is not set"):
        begin(str(tmp_path), 1)
    monkeypatch.setenv(TASK_VARIABLE, "job-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard: nobody answers
    with pytest.raises(InvalidInputError, match="starts cannot be counted, so it ends"):
        begin("s3://bucket/mini", 1)
