"""Steps without any server: what is found finished, what is done again, what is put aside, and what retries."""

import json
import logging
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from base import storage
from base.errors import ConfigError, MissingFileError, OperationalError, SupersededError, WorkerLostError
from tasks.files.outputs import find_output
from tasks.overrides import resolve
from tasks.processes.process import error_of
from tasks.steps import (
    RunContext,
    StepRecord,
    StepRun,
    find_finished,
    make_room,
    perform,
    worth_retrying,
    write_record,
)
from tasks.tracking.mlflow_tracker import MlflowRuns
from tasks.train import claim

# Nothing listens on the discard port: every test here runs with the tracking server down.
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def context(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = resolve("configs/tiny.yaml", {"runs_directory": str(tmp_path), "tracking": {"uri": NOWHERE}})
    return RunContext(str(tmp_path / "tiny"), config)


def write(context, text):
    """Work that publishes a directory with `text` in it."""

    def work(step):
        folder = context.path / "export"
        make_room(context, "export", folder, step.fingerprint)
        folder.mkdir(exist_ok=True)
        (folder / "text").write_text(text)
        storage.commit(str(folder))
        step.metrics(length=len(text))
        return {"export": str(folder)}

    return work


def events(context):
    return [json.loads(line)["event"] for line in (context.path / "events.jsonl").read_text().splitlines()]


def lines(context):
    """What the terminal shows of the steps' progress."""
    shown = map(json.loads, (context.path / "events.jsonl").read_text().splitlines())
    return [event["line"] for event in shown if "line" in event]


def test_the_same_inputs_find_the_finished_output(context):
    done = perform(context, "export", {"a": 1}, write(context, "one"))
    assert (done.reused, done.figures, done.run_id) == (False, {"length": 3}, None)
    found = perform(context, "export", {"a": 1}, lambda _: pytest.fail("worked again"))
    assert found.reused
    assert (found.outputs, found.fingerprint, found.finished_at) == (done.outputs, done.fingerprint, done.finished_at)
    assert events(context) == ["started", "finished", "reused"]


@pytest.mark.parametrize("wanted", [True, False])
def test_each_step_is_followed_by_system_metrics_as_long_as_it_works(tmp_path, wanted):
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "system_metrics": wanted}
    config = resolve("configs/tiny.yaml", {"runs_directory": str(tmp_path), "tracking": tracking})
    followed = []

    def work(_):
        followed.extend(thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor")
        return {}

    perform(RunContext(str(tmp_path / "tiny"), config), "export", {"a": 1}, work)
    assert len(followed) == wanted
    assert not any(thread.is_alive() for thread in followed)


def test_an_output_that_is_no_longer_committed_is_made_again(context):
    done = perform(context, "export", {"a": 1}, write(context, "one"))
    (context.path / "export" / storage.MARKER).unlink()
    assert find_finished(context.path, "export") is None
    again = perform(context, "export", {"a": 1}, write(context, "one"))
    assert not again.reused
    assert again.fingerprint == done.fingerprint


def test_other_inputs_put_the_old_output_aside_where_it_is_found_by_its_fingerprint(context):
    old = perform(context, "export", {"a": 1}, write(context, "one"))
    new = perform(context, "export", {"a": 2}, write(context, "two"))
    place = str(context.path / "export")
    assert old.outputs == new.outputs == {"export": place}
    for record, text in ((old, "one"), (new, "two")):
        found = find_output(place, record.fingerprint, str(context.path.parent))
        assert storage.is_committed(found)
        assert storage.read_bytes(f"{found}/text").decode() == text
    assert find_finished(context.path, "export", old.fingerprint) is None


def test_outputs_are_found_by_their_fingerprints_after_the_runs_directory_was_moved(context, tmp_path):
    records = {text: perform(context, "export", {"text": text}, write(context, text)) for text in ("one", "two")}
    place, moved = str(context.path / "export"), tmp_path / "moved"
    moved.mkdir()
    context.path.rename(moved / context.path.name)
    for text, record in records.items():
        found = find_output(place, record.fingerprint, str(moved))
        assert found.startswith(f"{moved}/")
        assert storage.read_bytes(f"{found}/text").decode() == text
    assert find_output(place, "f" * 64, str(moved)) == place, "a run of this name that made something else"
    assert find_output(place, records["two"].fingerprint, str(tmp_path / "none")) == place


def test_a_run_directory_that_is_moved_is_the_step_s_error_and_is_not_retried(context, tmp_path):
    def work(step):
        context.path.rename(tmp_path / "elsewhere")
        raise OperationalError(f"{context.path}/data: no such file")

    with pytest.raises(MissingFileError, match=r"the run's directory is gone: it was moved to .*/elsewhere"):
        perform(context, "export", {"a": 1}, work)
    with pytest.raises(MissingFileError, match=r"the run's directory is gone"):  # though the work itself went well
        perform(context, "export", {"a": 1}, lambda _: shutil.rmtree(context.path) or {})


def test_going_back_and_forth_loses_nothing(context):
    texts = ["one", "two", "one", "two"]
    for text in texts:
        perform(context, "export", {"text": text}, write(context, text))
    kept = sorted(path.joinpath("text").read_text() for path in context.path.glob("export*"))
    assert kept == ["one", "one", "two", "two"]


def test_an_output_that_lost_a_file_is_made_again_in_its_place(context):
    done = perform(context, "export", {"a": 1}, write(context, "one"))
    (context.path / "export" / "text").unlink()
    assert find_finished(context.path, "export") is None
    again = perform(context, "export", {"a": 1}, write(context, "one"))
    assert (again.reused, again.fingerprint) == (False, done.fingerprint)
    line = next(line for line in lines(context) if "made again" in line)
    assert line == f"{context.path}/export is no longer as it was committed (missing: text), so it is made again"
    assert perform(context, "export", {"a": 1}, lambda _: pytest.fail("worked again")).reused
    assert [path.name for path in context.path.glob("export*")] == ["export"]


def test_a_changed_output_is_made_again_and_the_change_is_kept(context):
    perform(context, "export", {"a": 1}, write(context, "one"))
    (context.path / "export" / "text").write_text("edited")
    perform(context, "export", {"a": 1}, write(context, "one"))
    assert (context.path / "export" / "text").read_text() == "one"
    assert (context.path / "export.damaged" / "text").read_text() == "edited"


def test_an_output_that_is_a_file_is_checked_too(context):
    def work(step):
        (context.path / "evaluation.json").write_text('{"verdict": "better"}')
        return {"evaluation": str(context.path / "evaluation.json")}

    perform(context, "evaluate", {}, work)
    assert perform(context, "evaluate", {}, lambda _: pytest.fail("worked again")).reused
    (context.path / "evaluation.json").write_text("")
    assert not perform(context, "evaluate", {}, work).reused


@pytest.mark.parametrize("content", ["", '{"step": "exp', "[]", "{}"])
def test_a_record_that_a_power_cut_left_empty_or_cut_is_no_finished_step(context, content, caplog):
    perform(context, "export", {"a": 1}, write(context, "one"))
    (context.path / "steps" / "export.json").write_text(content)
    assert find_finished(context.path, "export") is None
    assert "empty or cut short" in caplog.text
    assert not perform(context, "export", {"a": 1}, write(context, "one")).reused


def test_a_run_that_was_moved_or_copied_finds_its_own_outputs(context, tmp_path):
    perform(context, "export", {"a": 1}, write(context, "one"))
    shutil.copytree(context.path, tmp_path / "copied" / "tiny")
    copied = replace(context, directory=str(tmp_path / "copied" / "tiny"))
    found = perform(copied, "export", {"a": 1}, lambda _: pytest.fail("worked again"))
    assert found.outputs == {"export": str(copied.path / "export")}
    shutil.rmtree(context.path)
    assert find_finished(copied.path, "export") == found


def test_a_reused_step_of_another_flow_is_a_child_of_this_one(tmp_path):
    config = resolve("configs/tiny.yaml", {"runs_directory": str(tmp_path), "tracking": {"uri": "json:"}})
    first, second = (RunContext(str(tmp_path / "tiny"), config, parent_run_id=parent) for parent in ("one", "two"))
    done = perform(first, "export", {"a": 1}, write(first, "one"))
    perform(first, "export", {"a": 1}, write(first, "one"))
    for _ in range(2):
        assert perform(second, "export", {"a": 1}, write(second, "one")).reused
    runs = [json.loads(path.read_text()) for path in (tmp_path / "tracking" / "runs").glob("*.json")]
    (child,) = [run for run in runs if run["parent"] == "two"]
    assert (child["name"], child["status"]) == ("tiny-export", "FINISHED")
    assert child["tags"]["cherry.reused_from"] == done.run_id
    made = next(run for run in runs if run["parent"] == "one")
    assert child["metrics"] == made["metrics"]
    assert "export/length" in child["metrics"]
    assert len(runs) == 2


def step_run(context, inputs, code):
    return StepRun(context, "train", f"{inputs}{code}" * 32, None, context.tracker().runs, inputs * 64)


def finish_training(context, step):
    """Leave a finished train step of `step`'s fingerprints."""
    result = context.path / "train" / "result.json"
    result.write_text("{}")
    record = StepRecord("train", step.fingerprint, {"result": str(result)}, {}, 1.0, 2.0, None, None)
    write_record(context.path, replace(record, inputs_fingerprint=step.inputs_fingerprint))


def test_a_train_directory_of_another_config_is_put_aside(context):
    first, other = step_run(context, "a", "1"), step_run(context, "b", "1")
    assert claim(context, first) == first.fingerprint
    (context.path / "train" / "metrics.jsonl").write_text("kept\n")
    assert claim(context, first) == first.fingerprint
    assert (context.path / "train" / "metrics.jsonl").exists()
    assert claim(context, other) == other.fingerprint
    assert [path.name for path in (context.path / "train").iterdir()] == ["fingerprint"]
    assert (context.path / "train.a1a1a1a1" / "metrics.jsonl").read_text() == "kept\n"


def test_unfinished_training_goes_on_with_changed_code_and_finished_training_is_put_aside(context):
    old, new, newest = (step_run(context, "a", code) for code in "123")
    claim(context, old)
    (context.path / "train" / "checkpoint").write_text("kept\n")
    assert claim(context, new) == old.fingerprint
    assert (context.path / "train" / "checkpoint").exists()
    finish_training(context, new)
    assert claim(context, newest) == newest.fingerprint
    assert [path.name for path in (context.path / "train").iterdir()] == ["fingerprint"]
    assert (context.path / "train.a1a1a1a1" / "checkpoint").exists()


def test_a_record_of_an_earlier_version_is_read(context):
    stored = {
        **{"step": "data", "fingerprint": "f", "outputs": {}, "figures": {"a": 1}, "seconds": 1.5, "finished_at": 9.0},
        **{"mlflow_run_id": "r", "mlflow_parent_run_id": "p", "reused": False},
    }
    storage.write_json(str(context.path / "steps" / "data.json"), stored)
    found = find_finished(context.path, "data")
    assert (found.run_id, found.parent_run_id, found.inputs_fingerprint) == ("r", "p", "")


def test_step_code_runs_outside_of_prefect_and_logs_to_its_module(context, caplog):
    caplog.set_level(logging.INFO, logger="tasks.run_logger")
    done = perform(context, "export", {"a": 1}, lambda step: step.say("a line for the log", 0.5) or {})
    perform(context, "export", {"a": 1}, write(context, "again"))
    assert not done.reused
    assert "a line for the log" in caplog.text
    assert "found finished: export" in caplog.text


def test_other_code_is_another_identity(context, monkeypatch):
    first = perform(context, "export", {"a": 1}, write(context, "one"))
    monkeypatch.setattr("tasks.steps.step_digest", lambda step: f"other code of {step}")
    second = perform(context, "export", {"a": 1}, write(context, "two"))
    assert not second.reused
    assert second.inputs_fingerprint == first.inputs_fingerprint
    kept = find_output(f"{context.path}/export", first.fingerprint, context.config.runs_directory)
    assert storage.read_bytes(f"{kept}/text") == b"one"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("no"), "FAILED", "no"),
        (ZeroDivisionError("bug"), "FAILED", "ZeroDivisionError: bug"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
    ],
)
def test_a_step_that_does_not_end_well_is_no_finished_step(context, monkeypatch, error, status, line):
    ended = []
    monkeypatch.setattr(MlflowRuns, "finish", lambda _self, _run, status: ended.append(status))

    def work(step):
        raise error

    with pytest.raises(type(error)):
        perform(context, "export", {}, work)
    assert ended == [status]
    assert events(context) == ["started", "failed"]
    assert json.loads((context.path / "events.jsonl").read_text().splitlines()[-1])["line"] == line
    assert find_finished(context.path, "export") is None


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (WorkerLostError("killed"), True),
        (OperationalError("down"), True),
        (error_of(-9, [], "train"), True),
        (error_of(143, [], "train"), True),
        (error_of(1, ["Traceback"], "train"), False),
        (error_of(2, ["usage: train.py"], "train"), False),
        (SupersededError("a newer attempt took over"), False),
        (error_of(36, ["a newer attempt took over"], "train"), False),
        (ConfigError("wrong"), False),
        (MissingFileError("gone"), False),
        (error_of(16, ["loss nan"], "train"), False),
        (error_of(29, [], "train"), False),
        (ZeroDivisionError("a bug"), False),
    ],
)
def test_only_the_worlds_faults_are_retried(error, retried):
    def result():
        raise error

    assert worth_retrying(None, None, SimpleNamespace(result=result)) is retried
