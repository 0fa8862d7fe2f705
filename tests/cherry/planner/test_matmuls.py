"""Matmuls of a step: FLOPs of the published active parameters, precision by operand, and measured rates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cherry.hardware import GPUS
from cherry.planner.matmuls import (
    Matmul,
    backward_seconds,
    forward_seconds,
    head_matmul,
    layer_matmuls,
    mtp_matmul,
)
from cherry.planner.step_time import step_time
from cherry.planner.workload import Workload
from model.model_config import PRESETS, ModelConfig
from tests.cherry.planner.workloads import released_fp8


def test_blocks_multiply_in_fp8_and_nothing_else_does() -> None:
    """DeepSeek-V3, section 3.3.1; the router takes TensorFloat32, which its narrow product does not gain from."""
    work = released_fp8()
    found = {matmul.name: matmul.precision for moe in (True, False) for matmul in layer_matmuls(work, moe=moe)}
    assert found.pop("router") == "bf16"
    assert set(found.values()) == {"fp8"}
    assert {"kv_b_proj", "o_proj", "dense_down", "shared_gate_up", "experts_gate_up", "experts_down"} <= set(found)
    assert (head_matmul(work).precision, mtp_matmul(work).precision) == ("bf16", "bf16")
    wide = step_time(replace(work, precision="bf16"))
    assert step_time(work).busy["attention"] == wide.busy["attention"]
    assert step_time(work).busy["between matmuls"] == wide.busy["between matmuls"]


def test_what_is_narrower_than_a_scales_block_stays_in_bf16() -> None:
    narrow = ModelConfig.model_validate({**PRESETS["tiny"], "kv_lora_rank": 64, "moe_intermediate_size": 64})
    found = {
        matmul.name: matmul.precision
        for matmul in layer_matmuls(released_fp8(model=narrow, expert=1, shard=1), moe=True)
    }
    assert found["kv_b_proj"] == found["experts_gate_up"] == found["experts_down"] == "bf16"


@pytest.mark.parametrize(
    ("sizes", "teraflops"), [((1536, 2048, 2816), 1033), ((1536, 1408, 2048), 990), ((3500, 3500, 3500), 1066)]
)
def test_products_go_at_the_measured_rates(sizes: tuple[int, int, int], teraflops: int) -> None:
    """On an H200: gate and up, and down, of V2-Lite's experts, and dense ones of a size where bf16 reaches 769."""
    work = released_fp8(gpu=GPUS["H200"])
    matmul = Matmul("one", *sizes, "fp8")
    # The difference of passes is one product, where rows and results are as wide.
    square = replace(matmul, into=matmul.out) if sizes[0] == sizes[1] == sizes[2] else matmul
    operands = 4 * square.rows * (square.out - square.into) / (4.8e12 * 0.87)
    product = backward_seconds(work, square) - forward_seconds(work, square) - operands
    assert square.flops / product / 1e12 == pytest.approx(teraflops, rel=0.03)


def test_operands_cost_more_than_fp8_saves_where_an_expert_has_few_rows() -> None:
    work = released_fp8()
    many, few = Matmul("many", 8192, 7168, 4096, "fp8"), Matmul("few", 64, 7168, 4096, "fp8")
    assert forward_seconds(work, many) < forward_seconds(work, replace(many, precision="bf16"))
    assert forward_seconds(work, few) > forward_seconds(work, replace(few, precision="bf16"))


@pytest.mark.parametrize(("preset", "active"), [("671b", 36_625_603_584), ("16b", 2_451_435_008)])
def test_matmuls_of_a_step_are_the_published_active_parameters(preset: str, active: int) -> None:
    """Six operations a parameter and token, but for the norms', which are counted among them; recompute makes the
    blocks' products once more."""
    model = ModelConfig.model_validate({**PRESETS[preset], "num_nextn_predict_layers": 0})
    work = Workload(
        model=model, gpu=GPUS["H100"], gpus_per_node=8, replicate=1, shard=1, context=1, expert=1, micro_sequences=1,
        accumulation=2, sequence_length=4096, precision="bf16", recompute="none",
    )  # fmt: skip
    step = step_time(work)
    norms = 2 * model.hidden_size + model.kv_lora_rank + (model.q_lora_rank or 0)
    active -= model.num_hidden_layers * norms + model.hidden_size
    assert sum(matmul.flops for matmul in step.matmuls) / (6 * 2 * 4096) == pytest.approx(active, rel=1e-12)
    again = sum(matmul.flops for matmul in step_time(replace(work, recompute="full")).matmuls) / (8 * 2 * 4096)
    head = model.vocab_size * model.hidden_size
    assert again == pytest.approx(active - head / 4, rel=1e-12)
