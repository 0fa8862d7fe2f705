"""What is seen of a running job, on its way to MLflow: each node's use, stragglers, stacks of a hang."""

from __future__ import annotations

import json
import time

import pytest

from cherry.watch.node_sampler import node_file
from cherry.watch.rank_report import RankReport
from cherry.watch.stacks import keep_stacks
from cherry.watch.stragglers import Stragglers
from tasks.tracking.watch_relay import SLOWEST_RANK, WatchRelay


@pytest.fixture
def run_id(tracker):
    return tracker.runs.start("job-train", parent=None, step="train", identity=str(time.time_ns()), run_key="k")


def sample(folder, node, *values):
    path = node_file(folder, node)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        for value in values:
            figures = {"cpu_utilization_percentage": value, "gpu_0_power_usage_watts": 2 * value}
            file.write(json.dumps({"node": node, "number": value, "time": 100.0 + value, "figures": figures}) + "\n")


def compare_three_times(folder):
    stragglers = Stragglers(0.1)
    for number in range(1, 4):
        own = {0: ("node1", 1.0), 1: ("node2", 1.5)}
        reports = [RankReport(rank, 2, host, number, float(number), 2.0, each) for rank, (host, each) in own.items()]
        stragglers.compare(reports, 2).append_to(folder)


def client(tracker):
    return tracker._connection.get()[0]


def history(tracker, run_id, key):
    return [(one.step, one.value) for one in client(tracker).get_metric_history(run_id, key)]


def test_each_node_has_its_own_series_of_means_and_what_was_seen_before_is_not_sent(tracker, run_id, tmp_path):
    sample(tmp_path, "node1", 1)
    relay = WatchRelay(tmp_path, tracker.runs, run_id, nodes=True)
    sample(tmp_path, "node1", 2, 4)
    sample(tmp_path, "node2", 10)
    relay.send_new()
    relay.send_new()
    assert history(tracker, run_id, "system/node1/cpu_utilization_percentage") == [(4, 3.0)]
    assert history(tracker, run_id, "system/node1/gpu_0_power_usage_watts") == [(4, 6.0)]
    assert history(tracker, run_id, "system/node2/cpu_utilization_percentage") == [(10, 10.0)]


def test_an_outage_delays_points_and_a_run_without_system_metrics_sends_no_nodes(tmp_path):
    class Away:
        up, kept = False, []

        def points(self, run_id, points):
            self.kept += points if self.up else []
            return self.up

    tracker = Away()
    relay = WatchRelay(tmp_path, tracker, "run", nodes=True)
    silent = WatchRelay(tmp_path, tracker, "run", nodes=False)
    sample(tmp_path, "node1", 1)
    relay.send_new()
    tracker.up = True
    relay.send_new()
    silent.send_new()
    assert [(point.name, point.unix_ms) for point in tracker.kept] == [
        ("system/node1/cpu_utilization_percentage", 101_000),
        ("system/node1/gpu_0_power_usage_watts", 101_000),
    ]


def test_stragglers_are_a_series_a_tag_and_a_table_and_stacks_are_artifacts(tracker, run_id, tmp_path):
    with WatchRelay(tmp_path, tracker.runs, run_id, nodes=True):
        compare_three_times(tmp_path)
        kept = keep_stacks(tmp_path, {}, 2, "the job hangs")
    assert history(tracker, run_id, SLOWEST_RANK) == [(1, 0.5), (2, 0.5), (3, 0.5)]
    tags = client(tracker).get_run(run_id).data.tags
    assert tags["stragglers"] == "rank 1 on node2 computes 50% longer than the median rank"
    table = (tmp_path / "stragglers.csv").read_text().splitlines()
    assert table == ["step,unix_time,rank,host,own_seconds,excess", "3,3.0,1,node2,1.5,0.5"]
    found = [one.path for folder in ("", "stacks") for one in client(tracker).list_artifacts(run_id, folder)]
    assert {"stragglers.csv", f"stacks/{kept.name}"} <= set(found)
