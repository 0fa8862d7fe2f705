"""`cherry cluster check`: a row for each host, and an exit code that says whether all are fit."""

from __future__ import annotations

import json

import pytest

from cherry.remote.facts import code_digest
from tests.hosts import lab_hosts


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def test_this_machine_is_a_row_and_has_nobody_to_reduce_with(in_folder, code, capsys):
    assert code("cluster", "check", "local") in (0, None)
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("this machine"))
    assert "fit" in row and code_digest()[:8] in row
    assert "no all-reduce" in said and "every host is fit" in said
    assert list(in_folder.iterdir()) == []


def test_a_cluster_whose_hosts_are_not_known_yet_says_how_they_become_known(in_folder, two_hosts, code, capsys):
    (in_folder / "pair.yaml").write_text("kind: nodes\nprovider: two-hosts\ngpu: H100\nnodes: [{host: a}, {host: b}]\n")
    assert code("cluster", "check", "pair.yaml") == 11
    assert "cherry cluster up pair.yaml" in capsys.readouterr().err
    (in_folder / "plan.yaml").write_text("kind: nodes\ngpu: H100\nnodes: 2\n")
    assert code("cluster", "check", "plan.yaml") == 11
    assert "names no provider" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bad_host_is_named_with_what_to_do_in_the_table_and_in_json(in_folder, code, capsys, monkeypatch):
    for hosts in lab_hosts(in_folder / "lab", 2):
        monkeypatch.setenv("HOME", str(hosts.home))
        known = hosts.home / ".ssh" / "known_hosts"
        known.write_text("".join(line for line in known.read_text().splitlines(keepends=True) if "node1" in line))
        (in_folder / "hosts.yaml").write_text("nodes: [{host: node1}, {host: node2}]\n")
        assert code("cluster", "check", "hosts.yaml") == 11
        said = capsys.readouterr()
        rows = {line.split()[0]: line for line in said.out.splitlines() if line.startswith("node")}
        assert f"{hosts.address('node1')} (eth0)" in rows["node1"] and " fit " in rows["node1"]
        assert "unfit" in rows["node2"] and "no answer" in rows["node2"]
        assert "node2: its host key is not the one in ~/.ssh/known_hosts" in said.err
        assert code("cluster", "check", "hosts.yaml", "--json") == 11
        found = json.loads(capsys.readouterr().out)
        assert [(host["host"], host["fit"]) for host in found["hosts"]] == [("node1", True), ("node2", False)]
        assert found["all_reduce"] == {"hosts": [], "ranks_per_host": 1, "sizes": [], "error": None}
