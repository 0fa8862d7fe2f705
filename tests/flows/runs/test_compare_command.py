"""`cherry compare`: what differs between two runs' configs and figures, and the difference in loss."""

import json

import pytest

from base import storage
from base.errors import MissingFileError
from flows.runs.compare_command import compare_runs

LOSSES = tuple(2.0 + 0.01 * place for place in range(24))


def test_configs_and_figures_stand_side_by_side(make_run, tmp_path):
    first = make_run("a", train={"steps": 300}).finish("data", seconds=3.0).evaluate(bits=3.0)
    make_run("b", train={"steps": 600}).evaluate(bits=2.9)
    storage.write_json(f"{first.directory}/train/result.json", {"loss_last": 4.0, "tokens": 1000})
    found = compare_runs(tmp_path / "runs", "a", "b")
    assert found["config"] == {"train.steps": [300, 600]}
    assert found["figures"]["held-out bits per byte"] == [3.0, 2.9]
    assert found["figures"]["seconds of data"] == [3.0, None]
    assert found["figures"]["loss of the last step"] == [4.0, None]
    assert not [name for name in found["figures"] if name.startswith("cost")]


def test_the_difference_in_loss_has_its_interval_where_both_scored_the_same_documents(make_run, tmp_path):
    make_run("a").evaluate(losses=LOSSES)
    make_run("b").evaluate(losses=tuple(loss - 0.1 - 0.001 * (place % 3) for place, loss in enumerate(LOSSES)))
    found = compare_runs(tmp_path / "runs", "a", "b")["held_out"]
    assert found["low"] <= found["difference"] <= found["high"] < 0
    assert found["difference"] == pytest.approx(-0.101)
    assert (found["documents"], found["verdict"]) == (24, "better")
    assert found["text"].startswith("b against a: better.")


@pytest.mark.parametrize(("losses", "why"), [((), "b has no scores"), ((1.0,), "at least 2 documents")])
def test_losses_that_cannot_be_compared_say_why(make_run, tmp_path, losses, why):
    make_run("a").evaluate(losses=LOSSES)
    make_run("b").evaluate(losses=losses)
    found = compare_runs(tmp_path / "runs", "a", "b")["held_out"]
    assert found["difference"] is None
    assert why in found["text"]


def test_hosts_with_a_price_have_a_cost(make_run, tmp_path):
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("{kind: nodes, gpu: H100, nodes: 2, gpus_per_node: 8, price_per_gpu_hour: 2.5, currency: EUR}")
    launch = {"nnodes": 2, "nproc_per_node": 8}
    make_run("a", cluster=str(cluster), launch=launch).finish("train", seconds=3600.0)
    make_run("b", cluster=str(tmp_path / "gone.yaml"), launch=launch).finish("train", seconds=3600.0)
    assert compare_runs(tmp_path / "runs", "a", "b")["figures"]["cost, EUR"] == [40.0, None]


def test_damaged_runs_are_compared_as_far_as_they_go(make_run, tmp_path):
    make_run("a").finish_all()
    broken = make_run("b").directory
    (broken / "config.yaml").write_text("{")
    (broken / "steps" / "data.json").write_text("[")
    assert compare_runs(tmp_path / "runs", "a", "b")["figures"]["state"] == ["finished", "waiting"]


def test_the_command_prints_tables_or_json(make_run, tmp_path, capsys, code):
    make_run("a", seed=1).evaluate(losses=LOSSES)
    make_run("b", seed=2).evaluate(losses=LOSSES)
    where = ("--runs-directory", str(tmp_path / "runs"))
    assert code("compare", "a", "b", *where) == 0
    printed = capsys.readouterr().out
    assert "seed" in printed
    assert "b against a: can't tell" in " ".join(printed.split())
    assert code("compare", "a", "b", "--json", *where) == 0
    assert json.loads(capsys.readouterr().out)["config"] == {"seed": [1, 2]}
    assert code("compare", "a", "c", *where) == MissingFileError.exit_code
