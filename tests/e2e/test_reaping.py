"""The scheduled reaper on a real server, with a real worker: hosts of a run whose process is gone are given back."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from base import storage
from cherry.cluster import ClusterSpec
from tasks.clusters.taken import list_taken
from tasks.providers.protocol import read_reservation, write_reservation
from tasks.providers.registry import reserve

pytestmark = pytest.mark.long


def test_the_reaper_gives_back_what_a_killed_flow_left(project, worker):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    created = psutil.Process(gone.pid).create_time()
    gone.wait()
    directory = project.runs / "left"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(Path(project.config).read_text().replace("name: first", "name: left"))
    storage.write_json(str(directory / "lease.json"), {"pid": gone.pid, "created": created, "token": "t"})
    asked = reserve("local", ClusterSpec(kind="local"), str(directory), "left-0", nodes=1, ranks_per_node=1)
    write_reservation(directory, asked)
    assert [(one.name, one.state) for one in list_taken(project.runs)] == [("left", "gone")]
    ended = project.deployment_run("reap-flow/reap-clusters", runs_directory=str(project.runs))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = next(line for line in ended.stdout.splitlines() if "UUID:" in line).split("UUID:")[1].strip()
    assert project.end_of(run) == "COMPLETED", (project.home / "worker.log").read_text()[-4000:]
    assert read_reservation(directory) is None
    assert not (directory / "lease.json").exists()
    shutil.rmtree(directory)  # other tests list the runs
