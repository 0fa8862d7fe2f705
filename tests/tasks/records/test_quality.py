"""What quantized weights must keep to be served, and what is told when they don't."""

import pytest

from tasks.overrides import resolve
from tasks.records.quality import judge_quantized, pairs

TOKENS = 100


@pytest.fixture
def config(tmp_path):
    limits = {"quantize": {"max_dnll": 0.02, "max_kl": 0.05, "min_top1": 0.9, "format": "w4a16"}}
    return resolve("configs/tiny.yaml", {**limits, "runs_directory": str(tmp_path)})


def scores(rows):
    """Scores of documents, given loss, divergence and agreement per token of each."""
    documents = [
        {"id": str(number), "nll": TOKENS * nll, "kl": TOKENS * kl, "agreed": TOKENS * top1, "tokens": TOKENS}
        for number, (nll, kl, top1) in enumerate(rows)
    ]
    return {"documents": documents, "bits_per_byte": 1.0}


def judged(config, dnll=0.001, kl=0.01, top1=0.97, spread=0.1, documents=16):
    """Judgement of weights whose documents lie this share above and below the means in turn."""
    signs = [1 + spread * (-1) ** number for number in range(documents)]
    plain = scores([(2.0, 0.0, 1.0)] * documents)
    quantized = scores([(2.0 + dnll * sign, kl * sign, 1 - (1 - top1) * sign) for sign in signs])
    return judge_quantized(config, plain, quantized, milder="fp8_block")


def test_weights_that_cost_little_pass_with_every_figure(config):
    result = judged(config)
    assert result["quantized_passed"]
    assert result["quantized_dnll"] == pytest.approx(0.001)
    assert result["quantized_kl"] == pytest.approx(0.01)
    assert 0.01 < result["quantized_kl_upper"] < 0.011
    assert result["quantized_top1"] == pytest.approx(0.97)
    assert 0.968 < result["quantized_top1_lower"] < 0.97
    assert "KL 0.0100, at most 0.01" in result["quantized_reason"]
    assert "the likeliest token is the same for 97.0%, at least 96.9%" in result["quantized_reason"]
    assert "quantize." not in result["quantized_reason"]


@pytest.mark.parametrize(
    ("cost", "key"),
    [({"dnll": 0.03}, "max_dnll is 0.02"), ({"kl": 0.06}, "max_kl is 0.05"), ({"top1": 0.88}, "min_top1 is 0.9")],
)
def test_each_limit_refuses_by_itself_and_names_the_next_milder_format(config, cost, key):
    result = judged(config, **cost)
    assert not result["quantized_passed"]
    assert result["quantized_reason"].endswith(f"; quantize.{key}. The next milder is quantize.format=fp8_block")


@pytest.mark.parametrize("cost", [{"dnll": 0.018}, {"kl": 0.045}, {"top1": 0.91}])
def test_a_limit_that_only_the_bound_breaks_asks_for_documents(config, cost):
    """The estimate keeps the limit, its bound does not: another format is not what is missing."""
    result = judged(config, **cost, spread=1.0, documents=10)
    assert not result["quantized_passed"]
    assert "These documents are too few to decide" in result["quantized_reason"]
    assert "milder" not in result["quantized_reason"]


def test_a_closer_method_is_proposed_before_a_milder_format(config):
    plain, costly = scores([(2.0, 0.0, 1.0)] * 16), scores([(2.5, 0.01, 0.97)] * 16)
    reason = judge_quantized(config, plain, costly, milder="fp8_block", closer="gptq")["quantized_reason"]
    assert reason.endswith(
        ". quantize.method=gptq rounds in the same format at less cost. The next milder is quantize.format=fp8_block"
    )


def test_without_a_milder_format_the_export_is_proposed(config):
    plain = scores([(2.0, 0.0, 1.0)] * 16)
    reason = judge_quantized(config, plain, scores([(2.5, 0.01, 0.97)] * 16))["quantized_reason"]
    assert reason.endswith("quantize.max_dnll is 0.02. Deploy the export")


def test_several_broken_limits_are_named_together(config):
    reason = judged(config, kl=0.06, top1=0.5)["quantized_reason"]
    assert "quantize.max_kl is 0.05, quantize.min_top1 is 0.9" in reason


def test_one_sum_by_document(config):
    assert pairs(scores([(1.0, 0.5, 1.0), (2.0, 0.25, 0.5)]), "kl") == {"0": (50.0, TOKENS), "1": (25.0, TOKENS)}
