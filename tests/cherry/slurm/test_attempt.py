"""What happens to a real Slurm job after one of its starts, by the errors that its launchers left."""

from __future__ import annotations

import json

import pytest

from base.errors import (
    ConfigError,
    HardwareError,
    ServiceError,
    StoppedError,
    SupersededError,
    WorkerLostError,
    write_error,
)
from cherry.slurm import commands
from cherry.slurm.attempt import Start, ended_file
from tests.slurm import slurm_lab

pytestmark = pytest.mark.slow
SCRIPT = "#!/bin/bash\n#SBATCH --job-name=held --requeue --output=/dev/null --nodes=2\nexec sleep 600\n"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """node1 and node2."""
    yield from slurm_lab(tmp_path_factory.mktemp("lab"), 2)


@pytest.fixture
def start(lab, tmp_path, monkeypatch):
    """Makes the start of a job that runs on both nodes; the job is cancelled after the test."""
    monkeypatch.setenv("SLURM_CONF", str(lab.conf))
    job_id = commands.submit(SCRIPT)
    lab.until(lambda: commands.show(job_id).state == "RUNNING", "the job runs")
    records = tmp_path / "train" / "slurm" / job_id
    records.parent.mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", job_id)
    monkeypatch.setenv("SLURM_JOB_NODELIST", commands.show(job_id).nodes)

    def make(*, requeues=5, restarts=0, errors=()):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        for node, error in enumerate(errors):
            if error is not None:
                write_error(records.with_name(f"{job_id}.{restarts}.{node}.error.json"), error)
        made = Start(records, requeues)
        made.state = lambda: commands.show(job_id)
        made.ended = lambda: json.loads(ended_file(records).read_text())
        made.forget = lambda: [path.unlink() for path in records.parent.iterdir()]
        made.attempts = lambda: [
            json.loads(line) for line in (tmp_path / "train" / "attempts.jsonl").read_text().splitlines()
        ]
        return made

    yield make
    commands.cancel(job_id)
    lab.until(lambda: commands.jobs_named("held") == [], "the job is gone")


@pytest.mark.parametrize(
    ("code", "told", "errors", "expected"),
    [
        (137, False, (None, WorkerLostError("the connection broke")), 34),
        (137, False, (), 137),  # a launcher that was killed outright
        pytest.param(38, True, (StoppedError("step 7 is saved"),), 38, marks=pytest.mark.long),
        pytest.param(140, True, (), 140, marks=pytest.mark.long),
    ],
)
def test_a_job_is_queued_again_where_that_may_help(start, lab, code, told, errors, expected):
    made = start(errors=errors)
    made.begin()
    assert made.end(code, told=told) == expected
    assert (made.ended()["code"], made.ended()["requeued"]) == (expected, True)
    lab.until(lambda: made.state().restarts == 1, "it is queued again")


def test_a_job_that_would_end_so_again_is_not_queued_again(start, lab):
    lost, user = WorkerLostError("the connection broke"), ConfigError("no such key")
    cases = [(0, False, ()), (143, False, ()), (1, False, ()), (36, False, (SupersededError("a newer attempt"),))]
    # The kill of the others hides the error of the first in srun's exit code; a user error explains the others.
    cases += [(137, False, (lost, user)), (137, True, (user, None))]
    codes = []
    for code, told, errors in cases:
        made = start(errors=errors)
        made.begin()
        codes.append(made.end(code, told=told))
        assert not made.ended()["requeued"]
        assert (made.state().state, made.state().restarts) == ("RUNNING", 0)
        made.forget()
    assert codes == [0, 143, 1, 36, 11, 11]


def test_the_records_say_who_failed_with_what(start, capsys):
    made = start(errors=(None, ConfigError("model.hidden_size: no such key")))
    made.begin()
    made.end(11, told=False)
    began, ended = made.attempts()
    assert (began["event"], began["hosts"], began["attempt"]) == ("began", ["node1", "node2"], 1)
    assert (ended["event"], ended["host"], ended["code"]) == ("ended", "node2", 11)
    assert ended["error"] == "model.hidden_size: no such key"
    assert made.ended()["error"]["kind"] == "ConfigError"
    assert "start 1 of job" in capsys.readouterr().out


@pytest.mark.long
def test_a_node_that_computes_wrongly_is_left_out(start, lab):
    made = start(errors=(HardwareError("another sum", hosts=("node1.cluster.example",)),))
    made.begin()
    assert made.end(37, told=False) == 37
    assert made.state().excluded == "node1"


def test_no_start_comes_after_the_last_one_that_is_allowed(start):
    made = start(requeues=2, restarts=2, errors=(WorkerLostError("a rank was killed."),))
    made.begin()
    assert made.end(34, told=False) == 34
    assert not made.ended()["requeued"]
    assert made.ended()["error"]["message"] == "a rank was killed. The job was started again 2 times (slurm.requeues)."
    # Slurm itself queues a job again whose node is lost, without a limit.
    with pytest.raises(WorkerLostError, match=r"started again 2 times \(slurm\.requeues\) without an end"):
        start(requeues=2, restarts=3).begin()


@pytest.mark.parametrize(("code", "errors"), [(34, (WorkerLostError("a rank was killed"),)), (137, ())])
def test_a_cancelled_job_is_not_brought_back(start, code, errors):
    made = start(errors=errors)
    made.begin()
    commands.cancel(commands.jobs_named("held")[0])
    assert made.end(code, told=False) == code
    assert not made.ended()["requeued"]


def test_what_slurm_refuses_is_the_caller_s(start):
    with pytest.raises(ConfigError, match=r"sbatch refuses: .*partition"):
        commands.submit(SCRIPT.replace("--requeue", "--partition=none"), test_only=True)
    assert commands.submit(SCRIPT, test_only=True) == ""
    assert commands.jobs_named("held") and commands.show("999999") is None


@pytest.mark.long
def test_a_silent_controller_is_not_the_caller_s(start, tmp_path, monkeypatch, lab):
    elsewhere = tmp_path / "elsewhere.conf"
    elsewhere.write_text(lab.conf.read_text().replace("SlurmctldPort=", "SlurmctldPort=1\n#"))
    with monkeypatch.context() as patched:
        patched.setenv("SLURM_CONF", str(elsewhere))
        with pytest.raises(ServiceError, match="controller does not answer"):
            commands.jobs_named("held")
