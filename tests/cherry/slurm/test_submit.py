"""What a command line submits, and how a job's growing output is shown; tests/chaos/test_slurm.py has the rest."""

from __future__ import annotations

import pytest

from base.errors import ConfigError
from base.json_lines import append_json, read_lines
from base.progress import PROGRESS_FILE_VARIABLE
from cherry.slurm.submit import Output, parse_slurm


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "slurm.yaml"
    path.write_text("provider: slurm\nnodes: 4\ngpus_per_node: 8\n")
    return str(path)


def test_jobs_of_two_run_directories_never_share_a_name(spec, tmp_path):
    made = [
        parse_slurm([f"--cluster={spec}", "train.py", "--run_dir", str(tmp_path / parent / "my run")])
        for parent in ("a", "b")
    ]
    assert [(one.job.nodes, one.job.ranks_per_node) for one in made] == [(4, 8), (4, 8)]
    assert all(one.name.startswith("cherry-my-run-") for one in made)
    assert made[0].name != made[1].name
    assert parse_slurm([f"--cluster={spec}", "--name=mine", "train.py", "--run_dir", "r"]).name == "mine"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["train.py"], "needs --run_dir, on a file system"),
        (["train.py", "--run_dir", "s3://bucket/run"], "needs --run_dir, on a file system"),
        (["--name=a,b", "train.py", "--run_dir", "r"], "--name must be letters, digits"),
        (["--nnodes=5", "train.py", "--run_dir", "r"], "--nnodes must be from 1 to 4"),
    ],
)
def test_what_no_job_can_be_made_of_is_refused(spec, flags, told):
    with pytest.raises(ConfigError, match=told):
        parse_slurm([f"--cluster={spec}", *flags])


def test_lines_are_shown_once_they_are_whole_and_progress_is_passed_on(tmp_path, monkeypatch, capsys):
    passed_on = tmp_path / "progress.jsonl"
    monkeypatch.setenv(PROGRESS_FILE_VARIABLE, str(passed_on))
    file, records = tmp_path / "7.out", tmp_path / "7"
    output = Output(file, records)
    output.print_new()
    append_json(tmp_path / "7.progress.jsonl", {"line": "step 1/2", "fraction": 0.5})
    file.write_text("start 1\nstep 1/2\nste")
    output.print_new()
    assert capsys.readouterr().out == "start 1\nstep 1/2\n"
    assert read_lines(passed_on) == [{"line": "step 1/2", "fraction": 0.5}]
    with file.open("a") as handle:
        handle.write("p 2/2\nthe end")
    output.print_new()
    output.print_new(last=True)
    assert capsys.readouterr().out == "step 2/2\nthe end\n"
