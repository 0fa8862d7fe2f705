"""Stragglers among real ranks: one that gets less of a processor is named, with its host; none on an even job."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from base.config import load
from cherry.hooks.rank_reports import ForwardTimer, RankReports, timed_modules
from cherry.job_config import JobConfig
from cherry.train_record import TrainRecord
from cherry.training_model import TrainingModel
from cherry.watch.node_sampler import read_nodes
from cherry.watch.rank_report import read_job
from cherry.watch.stragglers import STRAGGLERS_FILE, read_comparisons
from model.layers import SwiGLU
from model.transformer import Block, DeepseekV3

DEADLINE_S = 240.0
# More than what other programs on the same cores make of the ranks' times.
FLAGS = (
    *("--steps=100000", "--batch_size=256"),
    *("--set", "train.straggler_share=0.5", "--set", "train.rank_report_every_s=0.5"),
)


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not in {DEADLINE_S} s: {what}"
        time.sleep(0.05)
    return value


@contextmanager
def slowed(process: psutil.Process) -> Iterator[None]:
    """Context in which a process runs for about a sixth of the time."""
    ended = threading.Event()

    def stop_and_go() -> None:
        with suppress(psutil.NoSuchProcess):
            while not ended.wait(0.005):
                process.suspend()
                ended.wait(0.025)
                process.resume()

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.long
def test_a_slowed_rank_is_named_with_its_host_until_it_keeps_up_again(make_job: Any) -> None:
    job = make_job("job")
    train = job.directory / "train"
    launcher = job.start(*FLAGS, ranks=2)

    def stragglers() -> list[list[int]]:
        path = train / STRAGGLERS_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        return [[one.rank for one in found.stragglers] for found in read_comparisons(map(json.loads, lines))]

    try:
        until(lambda: len(stragglers()) >= 4, "comparisons of an even job")
        assert not any(stragglers())
        ranks = psutil.Process(launcher.pid).children()
        (slow,) = (one for one in ranks if one.environ().get("RANK") == "1")
        with slowed(slow):
            until(lambda: [1] in stragglers(), "rank 1 is named")
        until(lambda: stragglers()[-1] == [], "nobody is named any more")
        assert read_nodes(train).keys() == {socket.gethostname()}  # by the launcher
        reports = read_job(train)
        assert [(one.rank, one.host) for one in reports] == [(0, socket.gethostname()), (1, socket.gethostname())]
        assert all(one.own_seconds is not None and 0 < one.own_seconds < one.step_seconds for one in reports)
    finally:
        launcher.send_signal(signal.SIGTERM)
        output = launcher.communicate()[0]
    assert all(names in ([], [1]) for names in stragglers())
    assert f"straggler: rank 1 on {socket.gethostname()} computes " in output
    news = [
        sentence for line in (train / STRAGGLERS_FILE).read_text().splitlines() for sentence in json.loads(line)["news"]
    ]
    assert news[-1] == f"rank 1 on {socket.gethostname()} is no longer a straggler"


def test_a_rank_reports_the_median_of_its_steps_since_the_report_before(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": 0, "ranks": 1, "every_s": 0.0, "stragglers": None, "print_line": print}
    reports = RankReports(None, tmp_path, **options)
    for step, seconds in ((1, 9.0), (2, 0.5)):
        reports.on_step_end(TrainRecord(step=step, step_seconds=seconds))
    reports.close()
    (report,) = read_job(tmp_path)
    assert (report.step, report.step_seconds, report.own_seconds) == (2, 0.5, None)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_first_step_which_warms_up_is_no_rank_s_pace(tmp_path: Path, steps: int) -> None:
    layer = nn.Linear(8, 8)
    options: dict[str, Any] = {"rank": 0, "ranks": 1, "every_s": 0.0, "stragglers": None, "print_line": print}
    reports = RankReports(ForwardTimer([layer], torch.device("cpu")), tmp_path, **options)
    for step in range(1, steps + 1):
        layer(torch.ones(2, 8))
        reports.on_step_end(TrainRecord(step=step, step_seconds=0.5))
    reports.close()
    (report,) = read_job(tmp_path)
    assert report.step == steps
    assert (report.own_seconds is None) == (steps == 1)


def test_only_the_forward_pass_of_training_is_timed() -> None:
    block = nn.Sequential(nn.Linear(8, 8))
    timer = ForwardTimer([block], torch.device("cpu"))
    assert timer.take() is None
    block(torch.ones(2, 8))
    block(torch.ones(2, 8))
    seconds = timer.take()
    assert seconds is not None and seconds > 0
    block.eval()
    block(torch.ones(2, 8))
    assert timer.take() is None
    block.train()
    timer.close()
    block(torch.ones(2, 8))
    assert timer.take() is None


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ([], Block),
        (["launch.nproc_per_node=2", "parallel.expert=2"], SwiGLU),
        (["launch.nproc_per_node=2", "parallel.context=2"], SwiGLU),
        (["launch.nproc_per_node=2", "parallel.expert=2", "train.compile=true"], None),
    ],
)
def test_modules_that_wait_for_other_ranks_inside_are_not_timed(job_config, overrides: list[str], kind: Any) -> None:
    config = load(job_config, JobConfig, overrides)
    with torch.device("meta"):
        network = TrainingModel(DeepseekV3(config.model), 16)
    modules = timed_modules(network, config)
    assert {type(module) for module in modules} == ({kind} if kind else set())
