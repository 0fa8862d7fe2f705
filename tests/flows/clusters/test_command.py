"""`cherry cluster ls`, `up`, `down`, `reap` and `render` as a person calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO

import psutil
import pytest
from rich.console import Console

from base import storage
from flows.clusters.tables import fitted
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
    assert not (in_folder / "runs" / "_clusters" / "pair").exists()
    assert code("cluster", "down", "pair") == 12
    assert "no cluster and no run 'pair' in runs. Nothing holds hosts there." in capsys.readouterr().err


def test_a_name_or_a_directory_that_is_not_there_is_an_error_that_names_what_is(in_folder, code, capsys):
    assert code("cluster", "up", "pair.yaml") in (0, None)
    assert code("cluster", "up", "pair.yaml", "--name", "other", "--nodes", "1") in (0, None)
    for name, told in (("pear", "Did you mean pair?"), ("zzz", "What holds hosts there: other, pair.")):
        assert code("cluster", "down", name) == 12
        assert f"no cluster and no run '{name}' in runs. {told}" in capsys.readouterr().err
    for command in (("ls",), ("ls", "--json"), ("reap",), ("down", "pair")):
        assert code("cluster", *command, "--runs-directory", "rums") == 12
        assert "no directory rums, where runs are looked for. Did you mean runs?" in capsys.readouterr().err
    assert len(list((in_folder / "runs" / "_clusters").glob("*/reservation.json"))) == 2
    (in_folder / "runs" / "done").mkdir()
    (in_folder / "runs" / "done" / "config.yaml").write_text("name: done\n")
    assert code("cluster", "down", "done") in (0, None)
    assert "done holds no hosts (in runs, these do: other, pair)" in capsys.readouterr().out


def test_an_object_store_is_no_directory_of_runs(in_folder, code, capsys):
    for command in (("up", "pair.yaml"), ("ls",), ("check", "pair.yaml")):
        assert code("cluster", *command, "--runs-directory", "s3://bucket/runs") == 11
        assert "'s3://bucket/runs' is a URI, and a directory of a file system is needed" in capsys.readouterr().err
    assert [one.name for one in in_folder.iterdir() if one.name.startswith("s3")] == []


def test_a_kept_cluster_whose_record_is_damaged_is_told_how_to_give_it_back(in_folder, code, capsys):
    assert code("cluster", "up", "pair.yaml") in (0, None)
    record = in_folder / "runs" / "_clusters" / "pair" / "reservation.json"
    record.write_text(record.read_text()[:40])
    for command in (("ls",), ("down", "pair"), ("up", "pair.yaml")):
        code("cluster", *command)
        told = "".join(capsys.readouterr())
        assert "Give back what the cluster pair still holds at its provider" in told, command
        assert "start the run" not in told


@pytest.mark.parametrize(("width", "columns"), [(60, 4), (80, 4), (120, 7)])
def test_the_list_is_whole_words_at_every_width(in_folder, code, capsys, monkeypatch, width, columns):
    assert code("cluster", "up", "pair.yaml", "--name", "training-pair") in (0, None)
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", str(width))
    assert code("cluster", "ls") in (0, None)
    heading, *rows = capsys.readouterr().out.rstrip().splitlines()
    assert len(heading.split()) == columns
    assert all(len(line) <= width for line in (heading, *rows))
    words = ["training-pair", "127.0.0.1,", "127.0.0.2", "alive", "1.5h"]
    words += ["two-hosts", "pair.yaml"] if columns == 7 else []
    assert set(words) <= {word.strip("()") for row in rows for word in row.split()}
    assert len(rows) == 1


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


@pytest.mark.parametrize("width", [20, 60, 80, 120, 200])
def test_columns_that_do_not_fit_go_to_another_table_with_the_first_one(width):
    headings = ("host", "state", "address", "torch", "GPUs")
    host = ("node1", "[green]fit[/]", "10.0.0.1 (eth0)", "2.11.0 (CUDA 12.8)", "8 NVIDIA H100 80GB HBM3, none faulty")
    tables = fitted(headings, [host, ("node2", "fit", "-", "-", "-")], width)
    console = Console(file=StringIO(), width=width)
    for table in tables:
        console.print(table)
    text = console.file.getvalue()
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert [table.columns[0].header for table in tables] == ["host"] * len(tables)
    assert [column.header for table in tables for column in table.columns[1:]] == list(headings[1:])
    for cell in ("fit", *host[2:4]) if width > 20 else ():
        assert cell in text
    assert (len(tables) == 1) == (width >= 120)
