"""What a run shows of its steps at its end."""

from tasks.lifecycle import _links, _rows
from tasks.overrides import resolve
from tasks.steps import RunContext, StepRecord


def test_the_page_shows_figures_for_people_and_how_to_see_the_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = resolve("configs/tiny.yaml", {"name": "left", "runs_directory": str(tmp_path)})
    context = RunContext(str(tmp_path / "left"), config, "a" * 32)
    figures = {"documents": 12345, "loss_last": 2.034567, "share": 0.00001234}
    record = StepRecord("train", "f", {"result": "r.json"}, figures, 12.34, context.began + 1, "b" * 32, "a" * 32)
    (row,) = _rows(context, [record])
    assert row["figures"] == "documents 12,345, loss_last 2.035, share 1.234e-05"
    text = _links(context, [record])
    assert (
        f"`mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db --port 5000 --workers 1  # http://127.0.0.1:5000`"
        in text
    )
    assert f"- train: `{'b' * 32}`" in text
