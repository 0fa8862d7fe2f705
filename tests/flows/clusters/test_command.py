"""`cherry cluster ls`, `up`, `down`, `reap` and `render` as a person calls them."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest

from base import storage
from tasks.providers.protocol import read_reservation, write_reservation


@pytest.fixture
def in_folder(tmp_path, two_hosts, monkeypatch):
    """A folder with a cluster file, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    nodes = "[{host: 127.0.0.1}, {host: 127.0.0.2}]"
    (tmp_path / "pair.yaml").write_text(
        f"kind: nodes\nprovider: two-hosts\ngpu: H100\nmax_lifetime: 90min\nnodes: {nodes}\n"
    )
    return tmp_path


def test_a_cluster_is_taken_listed_and_given_back(in_folder, code, capsys):
    assert code("cluster", "ls") in (0, None)
    assert "nothing is taken in runs" in capsys.readouterr().out
    assert code("cluster", "up", "pair.yaml") in (0, None)
    said = capsys.readouterr().out
    assert "pair: took 127.0.0.1, 127.0.0.2" in said
    assert f"use:    cherry run CONFIG cluster={in_folder}/runs/_clusters/pair/cluster.yaml" in said
    assert code("cluster", "up", "pair.yaml") in (0, None)
    assert "pair: holds 127.0.0.1, 127.0.0.2" in capsys.readouterr().out
    assert code("cluster", "ls") in (0, None)
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("pair "))
    assert all(word in row for word in ("two-hosts", "pair.yaml", "127.0.0.1, 127.0.0.2", "(in 1.5h)", "alive")), row
    assert "reap" not in table
    assert code("cluster", "ls", "--json") in (0, None)
    (one,) = json.loads(capsys.readouterr().out)["taken"]
    assert one["until"] - one["since"] == pytest.approx(5400.0)
    assert code("cluster", "down", "pair") in (0, None)
    assert "pair: 127.0.0.1, 127.0.0.2 given back" in capsys.readouterr().out
    assert code("cluster", "down", "pair") in (0, None)
    assert "pair holds no hosts (in runs, these do: nothing)" in capsys.readouterr().out


def test_what_is_overdue_is_said_and_reaped(in_folder, code, capsys):
    assert code("cluster", "up", "pair.yaml") in (0, None)
    directory = in_folder / "runs" / "_clusters" / "pair"
    held = read_reservation(directory)
    write_reservation(directory, held.model_copy(update={"since": held.since - 6000.0, "until": held.until - 6000.0}))
    capsys.readouterr()
    assert code("cluster", "ls") in (0, None)
    table = capsys.readouterr().out
    assert "overdue" in table and "ago)" in table and "cherry cluster reap" in table
    assert code("cluster", "reap") in (0, None)
    assert "given back: its maximum lifetime is over" in capsys.readouterr().out
    assert code("cluster", "reap") in (0, None)
    assert capsys.readouterr().out == "nothing to give back\n"


def test_what_cannot_be_given_back_is_an_error_and_stays(in_folder, code, capsys):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    created = psutil.Process(gone.pid).create_time()
    gone.wait()
    directory = in_folder / "runs" / "mine"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("name: [")
    storage.write_json(str(directory / "lease.json"), {"pid": gone.pid, "created": created, "token": "t"})
    assert code("cluster", "up", "pair.yaml") in (0, None)
    held = read_reservation(in_folder / "runs" / "_clusters" / "pair")
    write_reservation(directory, held.model_copy(update={"provider": "no-such"}))
    capsys.readouterr()
    assert code("cluster", "reap") == 30
    assert "mine:" in capsys.readouterr().err
    assert (directory / "reservation.json").exists()


def test_a_job_is_printed(tmp_path, capsys, code):
    cluster = tmp_path / "slurm.yaml"
    cluster.write_text("provider: slurm\nnodes: 2\n")
    assert code("cluster", "render", "configs/tiny.yaml", f"cluster={cluster}", f"runs_directory={tmp_path}") == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n")
    assert code("cluster", "render", "configs/tiny.yaml", "cluster=local") == 11
    assert "nothing to render" in capsys.readouterr().err
    assert code("cluster", "up", str(cluster), "--runs-directory", str(tmp_path)) == 11
    assert "Slurm gives nodes to jobs" in capsys.readouterr().err
