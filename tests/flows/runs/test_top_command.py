"""`cherry top`: figures of ranks, nodes and GPUs as the hosts wrote them, once or drawn until a key is typed."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from base.errors import MissingFileError
from base.json_lines import append_json, append_line
from cherry.watch.node_sampler import node_file
from cherry.watch.rank_report import RankReport
from cherry.watch.stragglers import Stragglers
from flows.runs.top_command import show_top
from tasks.records.events import log_file

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 120.0
FIGURES = {
    "cpu_utilization_percentage": 61.5,
    "system_memory_usage_megabytes": 12_340.0,
    "network_receive_megabytes_per_second": 101.25,
}
GPU = {
    "gpu_0_utilization_percentage": 97.0,
    "gpu_0_memory_usage_megabytes": 70_100.0,
    "gpu_0_memory_total_megabytes": 80_000.0,
    "gpu_0_power_usage_watts": 655.0,
    "gpu_0_temperature_celsius": 63.0,
}


@pytest.fixture
def run(make_run):
    """A run of four ranks on two nodes, of which rank 3 is a straggler."""
    directory = make_run("wide").train(step=7, steps=20, checkpoints=(4,), loss=2.5).directory
    train = directory / "train"
    stragglers = Stragglers(0.1)
    for number in range(1, 4):
        reports = [
            RankReport(
                rank, 4, f"node{1 + rank // 2}", 5 + number, time.time() + number, 0.5, 0.4 if rank == 3 else 0.2
            )
            for rank in range(4)
        ]
        for report in reports:
            report.write(train)
        stragglers.compare(reports, 4).append_to(train)
    for node, figures in (("node1", FIGURES | GPU), ("node2", FIGURES)):
        node_file(train, node).parent.mkdir(exist_ok=True)
        append_json(node_file(train, node), {"node": node, "number": 1, "time": time.time(), "figures": figures})
    append_line(log_file(directory, "train"), "the newest line")
    return directory


def drawn(run: Path, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width)
    show_top(console, run.parent, run.name, once=False)  # no terminal
    return console.file.getvalue()


def row(text: str, *begin: str) -> list[str]:
    return next(words for line in text.splitlines() if (words := line.split())[: len(begin)] == list(begin))


def test_ranks_nodes_gpus_and_the_newest_lines_are_shown(run):
    text = drawn(run)
    assert "step 7 of 20, loss 2.5000" in text
    assert "step_4" in text
    assert row(text, "3", "node2")[:6] == ["3", "node2", "8", "0.5", "0.4", "+100%"]
    assert row(text, "0", "node1")[:6] == ["0", "node1", "8", "0.5", "0.2", "+0%"]
    assert row(text, "node2", "62")[:7] == ["node2", "62", "%", "12.3", "GB", "101.2", "MB/s"]
    assert " ".join(row(text, "node1", "0", "97")) == "node1 0 97 % 70.1 GB 80.0 GB 655 W 63 °C"
    assert text.rstrip().endswith("the newest line")


def test_a_run_that_has_not_begun_training_says_so(make_run):
    text = drawn(make_run("fresh").directory)
    assert "no step yet" in text and "no rank has reported yet" in text


def test_an_unknown_run_is_an_error(run):
    with pytest.raises(MissingFileError, match="Did you mean wide"):
        show_top(Console(), run.parent, "wode", once=True)


def read_until(terminal: int, words: str) -> str:
    deadline, text = time.monotonic() + DEADLINE_S, ""
    while words not in text:
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 1 << 16).decode(errors="replace")
    return text


def test_on_a_terminal_it_is_drawn_until_q_with_the_slowest_ranks_where_not_all_fit(run, environment):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 100, 0, 0))
    command = [sys.executable, "-m", "flows.cli", "top", "wide", "--runs-directory", str(run.parent)]
    # xdist sets a size of its own, which would come before the terminal's.
    terminal = {key: value for key, value in environment.items() if key not in ("LINES", "COLUMNS")} | {"TERM": "xterm"}
    process = subprocess.Popen(command, cwd=ROOT, env=terminal, stdin=theirs, stdout=theirs, stderr=theirs)
    try:
        text = read_until(ours, "q ends this view")
        assert "and 1 more; cherry top --once has all ranks" in text
        (run / "train" / "metrics.jsonl").write_text(json.dumps({"step": 8, "steps": 20, "loss": 2.25}) + "\n")
        read_until(ours, "step 8 of 20")
        os.write(ours, b"q")
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
