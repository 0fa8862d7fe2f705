"""Views of a run whose internal files a power cut or a hand has damaged: drawn, or refused in a sentence."""

from __future__ import annotations

import json
import shutil
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from base.errors import CherryError
from base.json_lines import append_json
from cherry.remote.supervisor import hosts_of_a_killed_supervisor
from cherry.watch.node_sampler import NodeSample, node_file
from cherry.watch.rank_report import RankReport
from cherry.watch.stragglers import Stragglers
from flows.runs.logs_command import show_logs
from flows.runs.status_command import show_all, show_one
from flows.runs.top_command import show_top
from tasks.records.events import write_event, write_log
from tasks.tracking.metrics_relay import read_metrics

FILES = (
    *("train/ranks/0.json", "train/ranks/1.json", "train/nodes/node1.jsonl", "train/metrics.jsonl"),
    *("train/attempts.jsonl", "train/stragglers.jsonl", "train/result.json", "events.jsonl", "lease.json"),
    *("program.json", "steps/data.json", "register.json", "evaluate/evaluation.json", "plan.json"),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory with the run `job`, which has every file."""
    directory = tmp_path_factory.mktemp("runs") / "job"
    train = directory / "train"
    for folder in ("ranks", "nodes"):
        (train / folder).mkdir(parents=True)
    (directory / "config.yaml").write_text("name: job\n")
    stragglers = Stragglers(0.1)
    for number in range(1, 4):
        reports = [
            RankReport(rank, 2, f"node{rank}", number, time.time() + number, 0.5, 0.2 + rank / 10) for rank in (0, 1)
        ]
        for report in reports:
            report.write(train)
        found = stragglers.compare(reports, 2)
        assert found is not None
        found.append_to(train)
        append_json(train / "metrics.jsonl", {"step": number, "steps": 9, "loss": 2.0, "expert_load": [[0.5, 0.5]]})
    figures = {"cpu_utilization_percentage": 61.5, "gpu_0_power_usage_watts": 655.0}
    for number in (1, 2):
        append_json(node_file(train, "node1"), vars(NodeSample("node1", number, time.time(), figures)))
    append_json(train / "attempts.jsonl", {"attempt": 1, "event": "began", "hosts": ["node1"], "port": 1, "time": 1.0})
    write_event(directory, "train", "started")
    write_event(directory, "train", "progress", line="step 1", fraction=0.5)
    write_log(directory, "train", "a line")
    for name in FILES:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            values = {"pid": 2**22, "created": 1.0, "host": None, "seconds": 2.0, "verdict": "better", "version": 1}
            path.write_text(json.dumps({**values, "changes": ["a"], "predicted_peak_memory_gib": 1.0}))
    return directory.parent


def views(runs: Path) -> str:
    """What every view of the run prints."""
    output, directory = StringIO(), runs / "job"
    console = Console(file=output, width=120)
    for show in (
        lambda: show_top(console, runs, "job", once=True),
        lambda: show_one(console, runs, "job", as_json=False),
        lambda: show_all(console, runs, as_json=False),
        lambda: show_logs(directory, step=None, lines=5, follow=False, write=output.write),
    ):
        try:
            show()
        except CherryError as error:
            output.write(f"error: {error}\n")
    read_metrics(directory / "train" / "metrics.jsonl")
    hosts_of_a_killed_supervisor(directory / "train")
    return output.getvalue()


def test_whole_files_are_shown(whole: Path) -> None:
    text = views(whole)
    assert "step 3 of 9" in text and "655 W" in text and "a line" in text and "error" not in text
    assert hosts_of_a_killed_supervisor(whole / "job" / "train") == ["node1"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), data=st.data())
def test_a_damaged_file_costs_a_view_its_figures_and_never_is_a_traceback(
    whole: Path, tmp_path: Path, name: str, data: Any
) -> None:
    runs = tmp_path / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    shutil.copytree(whole, runs)
    path = runs / "job" / name
    content = path.read_bytes()
    path.write_bytes(data.draw(damaged(content)))
    text = views(runs)
    assert "a line" in text and "job" in text


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Half a file, bytes in place of others, no JSON, other values, and values of other types under the same keys."""
    lines = content.decode().splitlines()
    last = json.loads(lines[-1])
    before = "".join(f"{line}\n" for line in lines[:-1])

    def with_values(values: Any) -> bytes:
        return f"{before}{json.dumps(values)}\n".encode()

    changed = st.dictionaries(st.sampled_from(sorted(last)), VALUES, min_size=1, max_size=3)
    return st.one_of(
        st.integers(0, len(content)).map(lambda size: content[:size]),
        st.tuples(st.integers(0, len(content)), st.binary(max_size=20)).map(
            lambda cut: content[: cut[0]] + cut[1] + content[cut[0] + len(cut[1]) :]
        ),
        st.binary(max_size=60),
        st.just(b"[" * 100_000 + b"\n"),
        VALUES.map(with_values),
        changed.map(lambda values: with_values({**last, **values})),
        st.sampled_from(sorted(last)).map(lambda key: with_values({k: v for k, v in last.items() if k != key})),
        changed.map(lambda values: with_values(_deep(last, values))),
    )


def _deep(last: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values, inside of what is nested."""
    first = next(iter(values.values()))
    return {
        key: dict.fromkeys(value, first) if isinstance(value, dict) else [first] if isinstance(value, list) else value
        for key, value in last.items()
    }
