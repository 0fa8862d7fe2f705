"""The verdict from given losses: whether quantized weights pass, and what a champion without weights means for it."""

from types import SimpleNamespace

import pytest
from prefect.logging import disable_run_logger

from base import storage
from tasks.evaluate import find_champion, formats, shortfall, verdicts
from tasks.overrides import resolve
from tasks.run_config import TrackingConfig
from tasks.steps import RunContext
from tasks.tracking.mlflow_registry import MlflowRegistry
from tasks.tracking.protocol import ModelVersion

TOKENS = 100


@pytest.fixture
def config(tmp_path):
    limits = {"quantize": {"max_dnll": 0.02}, "evaluate": {"margin_nats": 0.01}}
    return resolve("configs/tiny.yaml", {**limits, "runs_directory": str(tmp_path)})


def scored(*losses):
    """What cherry.scoring writes, for documents of these losses (nats per token)."""
    documents = [{"id": str(n), "nll": TOKENS * loss, "tokens": TOKENS} for n, loss in enumerate(losses)]
    figures = {"bits_per_byte": 1.0, "zlib_bits_per_byte": 2.0, "loss": sum(losses) / len(losses)}
    return {"documents": documents, **figures}


def judged(config, costs, baseline="net v1", missing=None):
    candidate = [2.0 + n for n in range(len(costs))]
    quantized = [loss + cost for loss, cost in zip(candidate, costs, strict=True)]
    worse = [loss + 0.5 for loss in candidate]
    scores = {"candidate": scored(*candidate), "quantized": beside(scored(*quantized)), "baseline": scored(*worse)}
    return verdicts(config, scores, baseline, missing)


def beside(scores, kl=0.001, top1=0.99):
    """Scores with the sums that a reference adds, of these means per token."""
    for document in scores["documents"]:
        document |= {"kl": kl * document["tokens"], "agreed": top1 * document["tokens"]}
    return scores


def test_fewer_documents_than_were_asked_for_are_reported():
    assert shortfall(10, 10) is None
    assert shortfall(9, 10).startswith("compared on 9 documents, evaluate.documents asks for 10")


def test_quantized_weights_pass_by_their_upper_bound(config):
    result = judged(config, [0.010, 0.012, 0.011, 0.009] * 4)
    assert result["quantized_passed"]
    assert 0.0105 < result["quantized_dnll_upper"] < 0.02
    assert "too few" not in result["quantized_reason"]
    assert (result["verdict"], result["baseline"]) == ("better", "net v1")


def test_quantized_weights_that_cost_little_on_average_do_not_pass_when_they_may_cost_too_much(config):
    result = judged(config, [0.09, -0.05, 0.06, -0.04])
    assert result["quantized_dnll"] == pytest.approx(0.015)
    assert result["quantized_dnll_upper"] > 0.02
    assert not result["quantized_passed"]
    effect = result["quantized_vs_candidate"]["minimum_detectable_effect"]
    assert effect > 0.02
    assert f"too few to decide: they can show a difference from {effect:.4f} up" in result["quantized_reason"]


def test_quantized_weights_that_cost_too_much_are_reported_without_an_excuse(config):
    result = judged(config, [0.050, 0.052, 0.051, 0.049])
    assert not result["quantized_passed"]
    assert "too few" not in result["quantized_reason"]
    assert "quantize.max_dnll is 0.02. The next milder is quantize.format=bf16" in result["quantized_reason"]


def test_a_champion_whose_weights_are_gone_is_reported_and_not_replaced(config, tmp_path, monkeypatch):
    folder = tmp_path / "champion" / "export"
    champion = ModelVersion("net", 3, str(folder), {"export_fingerprint": "a" * 64})
    monkeypatch.setattr(MlflowRegistry, "version", lambda *_, **__: champion)
    context, exported = RunContext(str(tmp_path / "run"), config), SimpleNamespace(fingerprint="b" * 64)
    with disable_run_logger():
        found, missing = find_champion(context, exported)
        assert found is None
        folder.mkdir(parents=True)
        storage.commit(str(folder))
        assert find_champion(context, exported) == (champion, None)
    result = judged(config, [0.01] * 12, "untrained", missing)
    assert result["verdict"] == "can't tell"
    assert result["candidate_vs_baseline"]["verdict"] == "better"
    assert result["reason"].startswith(
        f"net v3, the champion, cannot be compared with: its weights are gone ({folder}: missing: COMMITTED)"
    )
    assert "Against the untrained model it is better" in result["reason"]


def test_a_candidate_is_compared_with_the_newest_champion_of_other_weights(config, tmp_path):
    config = config.model_copy(update={"tracking": TrackingConfig(uri=f"json:{tmp_path}/tracking")})
    context = RunContext(str(tmp_path / "run"), config)
    registry, name = context.tracker().registry, config.register_model.model_name
    for number, weights in ((1, "other"), (2, "mine"), (3, "mine")):
        folder = tmp_path / str(number)
        folder.mkdir()
        storage.commit(str(folder))
        tags = {"export_fingerprint": weights}
        registry.register(None, name, str(folder), identity=str(number), alias="candidate", tags=tags)
        registry.set_alias(name, "champion", number)
    with disable_run_logger():
        assert find_champion(context, SimpleNamespace(fingerprint="mine"))[0].version == 1
        assert find_champion(context, SimpleNamespace(fingerprint="new"))[0].version == 3
        registry.set_alias(name, "champion", 2)  # back: each is now the one before the other
        assert find_champion(context, SimpleNamespace(fingerprint="mine")) == (None, None)


def test_formats_are_judged_side_by_side_each_with_its_own_next_milder_one(config, tmp_path):
    config = config.model_copy(update={"quantize": config.quantize.model_copy(update={"compare": ("w4a16", "int8")})})
    plain = [2.0 + n for n in range(16)]
    scores = {
        "candidate": scored(*plain),
        "quantized": beside(scored(*[loss + 0.001 for loss in plain])),
        "quantized-w4a16": beside(scored(*[loss + 0.05 for loss in plain]), kl=0.2, top1=0.8),
    }
    folders = {name: str(tmp_path / name) for name in scores}
    for name, size in (("quantized", 50), ("quantized-w4a16", 25)):
        storage.write_json(f"{folders[name]}/quantization.json", {"bytes_before": 100, "bytes_after": size})
    own, other = formats(config, scores, folders)
    assert (own["format"], own["bytes_ratio"], own["passed"]) == ("int8", 0.5, True)
    assert (other["format"], other["bytes_ratio"], other["passed"]) == ("w4a16", 0.25, False)
    assert other["dnll"] == pytest.approx(0.05)
    assert other["reason"].endswith("The next milder is quantize.format=fp8_block")
    assert set(own) == set(other)
