"""Training's metrics on their way to a tracker that fails, and over a file that a resume rewrites."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cherry.train_record import FLOW_SERIES
from tasks.tracking.metrics_relay import MetricsRelay, read_metrics


class UnreliableTracker:
    """Keeps the points that it is sent while it is up."""

    def __init__(self):
        self.up = True
        self.points_kept = []

    def points(self, run_id, points):
        if self.up:
            self.points_kept += points
        return self.up


def lines(start, stop, apart_s=1.0):
    return [
        {"step": step, "loss": step / 7, "time": 1000.0 + step * apart_s, "expert_load": [[0.5]]}
        for step in range(start, stop)
    ]


def append(path, records):
    with path.open("a") as handle:
        handle.writelines(json.dumps(record) + "\n" for record in records)


def steps(tracker):
    return [(key, step, value) for key, value, step, _ in tracker.points_kept]


def wanted(stop):
    return [("train/loss", step, step / 7) for step in range(1, stop)]


@pytest.fixture
def relay(tmp_path):
    tracker = UnreliableTracker()
    made = MetricsRelay(tmp_path, tracker, "run")
    made.file, made.sink = tmp_path / "metrics.jsonl", tracker
    return made


def test_an_outage_delays_points_and_loses_none(relay):
    assert relay.send_new()  # nothing there yet
    append(relay.file, lines(1, 4))
    assert relay.send_new()
    relay.sink.up = False
    append(relay.file, lines(4, 9))
    assert not relay.send_new()
    relay.sink.up = True
    append(relay.file, lines(9, 11))
    assert relay.send_new()
    assert steps(relay.sink) == wanted(11)
    assert relay.sink.points_kept[0][3] == 1_001_000


def test_a_line_that_is_being_written_waits_for_its_end(relay):
    append(relay.file, lines(1, 3))
    with relay.file.open("a") as handle:
        handle.write('{"step": 3, "lo')
        handle.flush()
        assert relay.send_new()
        assert steps(relay.sink) == wanted(3)
        assert [record.step for record in read_metrics(relay.file)] == [1, 2]
        handle.write('ss": 0.42857142857142855, "time": 1003.0}\n')
    assert relay.send_new()
    assert steps(relay.sink) == wanted(4)


def test_another_relay_goes_on_where_the_first_one_ended(relay, tmp_path):
    append(relay.file, lines(1, 5))
    relay.send_new()
    append(relay.file, lines(5, 8))
    second = MetricsRelay(tmp_path, relay.sink, "run")
    assert second.send_new()
    assert second.send_new()
    assert steps(relay.sink) == wanted(8)


ACTIONS = st.sampled_from(["train", "resume", "send", "down", "up", "new relay"])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(ACTIONS, st.integers(0, 12)), max_size=30), st.sampled_from([0.3, 1.0]))
def test_each_step_is_sent_once_whatever_happens(tmp_path_factory, actions, apart_s):
    folder = tmp_path_factory.mktemp("stream")
    file, tracker = folder / "metrics.jsonl", UnreliableTracker()
    relay, written = MetricsRelay(folder, tracker, "run"), 0
    for action, size in actions:
        if action == "train":
            append(file, lines(written + 1, written + 1 + size, apart_s))
            written += size
        elif action == "resume":  # as the trainer does: lines past the checkpoint go, the file stays the same one
            written = max(0, written - size)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines(1, written + 1, apart_s)))
        elif action == "send":
            relay.send_new()
        elif action == "new relay":
            relay = MetricsRelay(folder, tracker, "run")
        else:
            tracker.up = action == "up"
    tracker.up = True
    file.touch()
    assert relay.send_new()
    furthest = max((step for _, step, _ in steps(tracker)), default=0)
    assert steps(tracker) == wanted(furthest + 1)
    assert furthest >= written


def test_steps_that_a_rollback_takes_again_are_sent_again_and_a_loss_that_is_not_finite_is_not(relay, tmp_path):
    append(relay.file, [{**line, "rollbacks": 0} for line in lines(1, 7)])
    append(relay.file, [{"step": 7, "loss": None, "skipped_steps": 1, "rollbacks": 0, "time": 1007.0}])
    assert relay.send_new()
    assert [point for point in steps(relay.sink) if point[0] == "train/loss"] == wanted(7)
    assert ("train/skipped_steps", 7, 1.0) in steps(relay.sink)
    relay.sink.points_kept.clear()
    relay.file.unlink()
    append(relay.file, [{**line, "rollbacks": 0} for line in lines(1, 5)])
    append(relay.file, [{**line, "loss": 0.5, "rollbacks": 1} for line in lines(5, 7)])
    later = MetricsRelay(tmp_path, relay.sink, "run")
    assert later.send_new()
    assert [point for point in steps(relay.sink) if point[0] == "train/loss"] == [
        ("train/loss", 5, 0.5),
        ("train/loss", 6, 0.5),
    ]


def test_the_flows_run_gets_its_own_series_from_the_first_step_on_under_the_names_of_the_tracker(relay, tmp_path):
    records = lines(1, 4)
    records[2] |= {"heldout_loss": 0.5, "tokens_per_second": 9.0}
    append(relay.file, records)
    assert relay.send_new()
    relay.sink.points_kept.clear()
    parent = MetricsRelay(tmp_path, relay.sink, "parent", FLOW_SERIES)
    assert parent.send_new()
    assert parent.send_new()
    assert steps(relay.sink) == [*wanted(4), ("train/heldout_window_loss", 3, 0.5)]


def test_of_steps_within_a_second_each_sends_its_loss_and_the_first_and_the_last_one_everything(relay, tmp_path):
    times = {1: 1000.2, 2: 1000.6, 3: 1000.9, 4: 1001.0, 5: 1001.8, 6: 1001.9}
    records = [
        {"step": step, "steps": 6, "loss": step / 7, "grad_norm": 0.1 * step, "rollbacks": 0, "time": time}
        for step, time in times.items()
    ]
    append(relay.file, records[:2])
    assert relay.send_new()
    append(relay.file, records[2:3])
    relay = MetricsRelay(tmp_path, sink := relay.sink, "run")  # a later one tells the same steps apart
    assert relay.send_new()
    append(tmp_path / "metrics.jsonl", records[3:])
    assert relay.send_new()
    assert [point for point in steps(sink) if point[0] == "train/loss"] == wanted(7)
    for key in ("train/grad_norm", "train/rollbacks"):
        assert [step for name, step, _ in steps(sink) if name == key] == [1, 4, 6]


@pytest.mark.parametrize("mark", [{"heldout_loss": 0.25}, {"skipped": "grad_norm inf"}, {"failed_saves": ["full"]}])
def test_a_step_that_a_person_looks_for_sends_everything_whenever_it_is(relay, mark):
    records = [{"step": step, "steps": 9, "grad_norm": 0.1 * step, "time": 1000.5} for step in (1, 2, 3)]
    records[1] |= mark
    append(relay.file, records)
    assert relay.send_new()
    assert [step for key, step, _ in steps(relay.sink) if key == "train/grad_norm"] == [1, 2]
