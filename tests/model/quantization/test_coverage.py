"""Coverage of experts: totals, the least covered ones, and a row a layer."""

from __future__ import annotations

from model.calibration.expert_rows import ExpertCoverage
from model.quantization.coverage import calibration_line, describe_coverage


def test_totals_and_the_least_covered_experts() -> None:
    experts = [
        ExpertCoverage(layer, expert, 100 * layer + expert, 3 * (expert == 0)) for layer in (1, 2) for expert in (0, 1)
    ]
    found = describe_coverage([*experts, ExpertCoverage(3, 0, 7, 93), ExpertCoverage(3, 1, 500, 0)])
    assert (found["expert_tokens_least"], found["experts_borrowed"]) == (7, 3)
    assert found["expert_tokens_mean"] == (100 + 101 + 200 + 201 + 7 + 500) / 6
    assert found["least_covered"][:2] == [
        {"layer": 3, "expert": 0, "tokens": 7, "borrowed": 93},
        {"layer": 1, "expert": 0, "tokens": 100, "borrowed": 3},
    ]
    assert found["coverage"][2] == {"layer": 3, "tokens": [7, 500], "borrowed": [93, 0]}
    line = calibration_line("gptq", {"tokens": 12_345, **found})
    assert line == (
        "calibrated by gptq with 12,345 tokens: an expert saw 185 on average, at least 7 (layer 3, expert 0); 3 took "
        "others' tokens too"
    )


def test_a_model_without_experts_has_none() -> None:
    found = describe_coverage([])
    assert found == {"coverage": []}
    assert calibration_line("awq", {"tokens": 9, **found}).endswith("the model has no routed experts")
