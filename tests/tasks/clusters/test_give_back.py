"""Hosts are given back when their process is gone or their time is over, and never under a process that works."""

from __future__ import annotations

import socket

import psutil
import pytest

from base import storage
from base.errors import InvalidInputError
from tasks.clusters.give_back import give_back, reap
from tasks.clusters.keep import take
from tasks.clusters.taken import list_taken
from tasks.providers.protocol import read_reservation, write_hosts, write_reservation


def test_hosts_of_a_run_that_was_killed_are_given_back_and_of_one_at_work_are_not(runs, take_for_run, owner, calls):
    directory = take_for_run("mine", owner)
    with pytest.raises(InvalidInputError, match=rf"mine: process {owner.pid} .* works on this run\. Stop that first"):
        give_back(*list_taken(runs))
    assert reap(runs).done == reap(runs).failed == []
    owner.kill()
    owner.wait()
    (line,) = reap(runs).done
    assert line == "mine: 127.0.0.1, 127.0.0.2 given back: no process works on the run"
    assert calls() == ["acquire mine", "release mine"]
    assert not (directory / "lease.json").exists()
    assert reap(runs).done == [], "once is enough"


def test_a_run_whose_config_is_gone_gives_its_hosts_back_too(runs, take_for_run, owner, calls):
    directory = take_for_run("mine", owner)
    (directory / "config.yaml").write_text("name: [")
    owner.kill()
    owner.wait()
    assert len(reap(runs).done) == 1
    assert calls() == ["acquire mine", "release mine"]


def test_an_overdue_run_has_ten_minutes_to_end_by_itself_then_it_is_ended(runs, take_for_run, owner, calls):
    directory = take_for_run("mine", owner, held_s=3600.0 + 300.0)
    assert reap(runs).done == []
    assert owner.poll() is None
    held = read_reservation(directory)
    write_reservation(directory, held.model_copy(update={"until": held.until - 360.0}))
    (line,) = reap(runs).done
    assert line.startswith("mine:") and line.endswith("its maximum lifetime is over")
    assert not psutil.pid_exists(owner.pid)
    assert calls() == ["acquire mine", "release mine"]
    assert read_reservation(directory) is None


def test_a_process_on_another_host_is_named_and_left(runs, take_for_run, owner, calls):
    directory = take_for_run("mine", owner, held_s=3600.0 + 660.0)
    lease = storage.read_json(str(directory / "lease.json"))
    storage.write_json(str(directory / "lease.json"), {**lease, "host": "elsewhere", "boot": "other"})
    assert socket.gethostname() != "elsewhere"
    (line,) = reap(runs).failed
    assert f"process {owner.pid} on elsewhere still works on it" in line
    assert calls() == ["acquire mine"]


def test_a_kept_cluster_goes_when_its_time_is_over_and_one_that_fails_does_not_stop_the_rest(
    runs, cluster_file, take_for_run, owner, calls
):
    directory, hosts, _ = take(cluster_file, runs, name="pair", nodes=None)
    held = read_reservation(directory)
    write_reservation(directory, held.model_copy(update={"until": held.since}))
    write_hosts(directory, hosts)
    broken = take_for_run("broken", owner)
    owner.kill()
    owner.wait()
    record = read_reservation(broken)
    write_reservation(broken, record.model_copy(update={"provider": "gone"}))
    reaped = reap(runs)
    assert [line.partition(":")[0] for line in reaped.done] == ["pair"]
    assert [line.partition(":")[0] for line in reaped.failed] == ["broken"]
    assert calls() == ["acquire broken", "acquire kept-pair", "release kept-pair"]
