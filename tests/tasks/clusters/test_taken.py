"""What is taken, and its state: of runs by their process, of kept clusters by their hosts, of both by their time."""

from __future__ import annotations

import pytest

from tasks.clusters.keep import take
from tasks.clusters.taken import list_taken
from tasks.providers.protocol import RESERVATION_FILE


def states(runs):
    return {one.name: (one.state, one.reason, one.is_left) for one in list_taken(runs)}


def test_where_nothing_is_there_is_nothing(tmp_path):
    assert list_taken(tmp_path / "none") == []


def test_a_run_s_hosts_are_its_process_s(runs, take_for_run, owner):
    directory = take_for_run("mine", owner)
    (one,) = list_taken(runs)
    assert (one.name, one.is_kept, one.hosts) == ("mine", False, ("127.0.0.1", "127.0.0.2"))
    assert one.reservation.until - one.reservation.since == pytest.approx(3600.0)
    assert "@" in one.reservation.owner
    assert states(runs) == {"mine": ("alive", "", False)}
    owner.kill()
    owner.wait()
    assert states(runs) == {"mine": ("gone", "no process works on the run", True)}
    (directory / RESERVATION_FILE).unlink()
    assert list_taken(runs) == []


def test_what_is_held_past_its_time_is_overdue_whoever_holds_it(runs, take_for_run, owner):
    take_for_run("mine", owner, held_s=3601.0)
    assert states(runs) == {"mine": ("overdue", "its maximum lifetime is over", True)}


def test_a_kept_cluster_needs_no_process_and_is_not_given_back_because_a_host_is_silent(runs, cluster_file):
    take(cluster_file, runs, name="pair", nodes=None)
    assert states(runs) == {"pair": ("alive", "", False)}
    next((runs / "_clusters" / "allocations").glob("*/127.0.0.2")).unlink()
    state, reason, is_left = states(runs)["pair"]
    assert (state, is_left) == ("gone", False)
    assert reason.startswith("its hosts do not all answer; `cherry cluster down pair`")


def test_a_record_that_cannot_be_read_is_shown_beside_the_others(runs, take_for_run, owner):
    take_for_run("mine", owner)
    (runs / "old").mkdir()
    (runs / "old" / RESERVATION_FILE).write_text("{}")
    (runs / "old" / "config.yaml").write_text("")
    found = states(runs)
    assert found["mine"][0] == "alive"
    assert found["old"][0] == "unreadable" and "reservation.json" in found["old"][1]


def test_hosts_of_the_reservation_before_are_not_taken_for_those_of_this_one(runs, take_for_run, owner):
    directory = take_for_run("mine", owner)
    record = directory / RESERVATION_FILE
    record.write_bytes(record.read_bytes())
    (one,) = list_taken(runs)
    assert (one.hosts, one.state, one.reason) == ((), "alive", "its hosts are being taken")
