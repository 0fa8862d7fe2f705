"""`cherry status` as a table, in detail, and as the JSON that scripts read."""

import io
import json

import jsonschema
import psutil
import pytest
from rich.console import Console

from base import storage
from base.errors import MissingFileError
from flows.runs.status_command import show_all

NUMBER, TEXT = {"type": ["number", "null"]}, {"type": ["string", "null"]}
# The contract with scripts: keys may be added, none may go or change its type.
RUN = {
    "type": "object",
    "required": [
        *("name", "directory", "state", "changed_at", "age_s", "finished_steps", "steps_in_all", "working_on"),
        *("training", "verdict", "reason", "heldout_bits_per_byte", "model", "version", "served", "processes"),
    ],
    "properties": {
        "name": {"type": "string"},
        "directory": {"type": "string", "pattern": "^/"},
        "state": {"enum": ["running", "waiting", "finished", "failed", "interrupted"]},
        "changed_at": {"type": "number"},
        "age_s": {"type": "number", "minimum": 0},
        "finished_steps": {"type": "object", "additionalProperties": {"type": "number"}},
        "steps_in_all": {"const": 8},
        "working_on": TEXT,
        "training": {
            "type": "object",
            "required": ["step", "steps", "loss", "seconds_left", "checkpoint"],
            "additionalProperties": {"type": ["number", "string", "null"]},
        },
        "verdict": TEXT,
        "reason": TEXT,
        "heldout_bits_per_byte": NUMBER,
        "model": TEXT,
        "version": {"type": ["integer", "null"]},
        "served": {"type": "array", "items": {"type": "string"}},
        "processes": {"type": "integer"},
        "changes": {"type": "array", "items": {"type": "string"}},
        "champion_reason": TEXT,
    },
}
RATE = "train.learning_rate: 0.003 before, 0.001 now"
ALL = {"type": "object", "required": ["runs"], "properties": {"runs": {"type": "array", "items": RUN}}}


@pytest.fixture
def runs(make_run, tmp_path):
    make_run("begun")
    make_run("done").train(step=9, steps=9).finish_all().evaluate(verdict="better", bits=2.5).register("small", 3)
    make_run("working").finish("provision", "data").train(step=3, steps=9).hold(psutil.Process())
    return tmp_path / "runs"


def test_json_has_a_stable_shape(runs, capsys, code):
    assert code("status", "--json", "--runs-directory", str(runs)) == 0
    printed = json.loads(capsys.readouterr().out)
    jsonschema.validate(printed, ALL)
    assert {run["name"]: run["state"] for run in printed["runs"]} == {
        "working": "running", "done": "finished", "begun": "waiting",
    }  # fmt: skip
    assert code("status", "done", "--json", "--runs-directory", str(runs)) == 0
    one = json.loads(capsys.readouterr().out)
    jsonschema.validate(one, RUN)
    assert (one["verdict"], one["heldout_bits_per_byte"], one["version"]) == ("better", 2.5, 3)
    assert code("status", "--json", "--runs-directory", str(runs / "none")) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": []}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_says_state_steps_verdict_and_age(runs, width):
    text = io.StringIO()
    show_all(Console(file=text, width=width, color_system=None), runs, as_json=False)
    lines = text.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    for heading in ("run", "state", "steps", "verdict", "held-out", "when"):
        assert heading in lines[0]
    words = " ".join(text.getvalue().split())
    for word in ("finished", "running", "waiting", "better", "ago"):
        assert word in words
    if width == 120:
        assert "7 of 8: register" in words
        assert "2.500 bits/byte" in words


def test_one_run_in_detail(runs, capsys, code):
    storage.write_json(str(runs / "done" / "plan.json"), {"predicted_peak_memory_gib": 0.61})
    storage.write_json(str(runs / "done" / "train" / "result.json"), {"peak_memory_gib": 0.64, "changes": [RATE]})
    rival = {"name": "small", "version": 3, "champion_reason": "another version became the champion"}
    storage.write_json(str(runs / "done" / "register.json"), rival)
    assert code("status", "done", "--runs-directory", str(runs)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "state finished",
        "better: a reason",
        "small v3",
        "0.61 GiB planned, 0.64 GiB measured",
        "step 9 of 9, loss 2.000",
        f"changed {RATE}",
        "small v3, not the champion: another version became the champion",
    ):
        assert text in printed
    assert code("status", "done", "--json", "--runs-directory", str(runs)) == 0
    assert json.loads(capsys.readouterr().out)["changes"] == [RATE]
    assert code("status", "dome", "--runs-directory", str(runs)) == MissingFileError.exit_code
    assert "Did you mean done?" in capsys.readouterr().err
