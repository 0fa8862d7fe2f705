"""What a plan says of training in fp8: which matmuls, how fast, what memory, and where a search offers it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from base.config import load
from cherry.cluster import read_cluster
from cherry.hardware import GPUS
from cherry.planner import search as searching
from cherry.planner.activations import layer_activations
from cherry.planner.matmuls import (
    Matmul,
    backward_seconds,
    forward_seconds,
    head_matmul,
    layer_matmuls,
    mtp_matmul,
)
from cherry.planner.memory import memory_of
from cherry.planner.plan import make_plan
from cherry.planner.step_time import step_time
from cherry.planner.workload import Workload, cluster_problems
from model.model_config import PRESETS, ModelConfig
from tasks.run_config import RunConfig

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def released(**keys: object) -> Workload:
    """The 671B release in fp8 on 256 H100."""
    known: dict[str, object] = {
        "model": ModelConfig.model_validate(PRESETS["671b"]),
        "gpu": GPUS["H100"],
        "gpus_per_node": 8,
        "replicate": 1,
        "shard": 8,
        "context": 1,
        "expert": 32,
        "micro_sequences": 2,
        "accumulation": 1,
        "sequence_length": 4096,
        "precision": "fp8",
        "recompute": "full",
        "expert_ranks_per_node": 8,
    }
    return Workload(**{**known, **keys})  # type: ignore[arg-type]


def test_blocks_multiply_in_fp8_and_nothing_else_does() -> None:
    """DeepSeek-V3, section 3.3.1; the router takes TensorFloat32, which its narrow product does not gain from."""
    work = released()
    found = {one.name: one.precision for moe in (True, False) for one in layer_matmuls(work, moe=moe)}
    assert found.pop("router") == "bf16"
    assert set(found.values()) == {"fp8"}
    assert {"kv_b_proj", "o_proj", "dense_down", "shared_gate_up", "experts_gate_up", "experts_down"} <= set(found)
    assert (head_matmul(work).precision, mtp_matmul(work).precision) == ("bf16", "bf16")
    wide = step_time(replace(work, precision="bf16"))
    assert step_time(work).busy["attention"] == wide.busy["attention"]
    assert step_time(work).busy["between matmuls"] == wide.busy["between matmuls"]


def test_what_is_narrower_than_a_scales_block_stays_in_bf16() -> None:
    narrow = ModelConfig.model_validate({**PRESETS["tiny"], "kv_lora_rank": 64, "moe_intermediate_size": 64})
    found = {one.name: one.precision for one in layer_matmuls(released(model=narrow, expert=1, shard=1), moe=True)}
    assert found["kv_b_proj"] == found["experts_gate_up"] == found["experts_down"] == "bf16"


@pytest.mark.parametrize(
    ("sizes", "teraflops"), [((1536, 2048, 2816), 1033), ((1536, 1408, 2048), 990), ((3500, 3500, 3500), 1066)]
)
def test_products_go_at_the_measured_rates(sizes: tuple[int, int, int], teraflops: int) -> None:
    """On an H200: gate and up, and down, of V2-Lite's experts, and dense ones of a size where bf16 reaches 769."""
    work = released(gpu=GPUS["H200"])
    matmul = Matmul("one", *sizes, "fp8")
    # The difference of passes is one product, where rows and results are as wide.
    square = replace(matmul, into=matmul.out) if sizes[0] == sizes[1] == sizes[2] else matmul
    operands = 4 * square.rows * (square.out - square.into) / (4.8e12 * 0.87)
    product = backward_seconds(work, square) - forward_seconds(work, square) - operands
    assert square.flops / product / 1e12 == pytest.approx(teraflops, rel=0.03)


def test_operands_cost_more_than_fp8_saves_where_an_expert_has_few_rows() -> None:
    work = released()
    many, few = Matmul("many", 8192, 7168, 4096, "fp8"), Matmul("few", 64, 7168, 4096, "fp8")
    assert forward_seconds(work, many) < forward_seconds(work, replace(many, precision="bf16"))
    assert forward_seconds(work, few) > forward_seconds(work, replace(few, precision="bf16"))


def test_memory_is_bf16s_but_for_what_matmuls_keep() -> None:
    narrow, wide = memory_of(released())[0], memory_of(released(precision="bf16"))[0]
    for stage, components in narrow.stages.items():
        for name in ("parameters", "gradients", "optimizer states", "gathered layers", "reduction buffers", "dispatch"):
            assert components[name] == wide.stages[stage][name], (stage, name)
    assert narrow.total == pytest.approx(wide.total, rel=0.02)
    for moe in (True, False):
        kept = [
            layer_activations(released(precision=precision, recompute="none"), moe=moe, imbalance=1.0).saved
            for precision in ("fp8", "bf16")
        ]
        assert kept[0] < kept[1]


def test_a_step_is_faster_and_its_mfu_is_of_the_fp8_peak() -> None:
    narrow, wide = step_time(released()), step_time(released(precision="bf16"))
    assert 1.05 < wide.total / narrow.total < 1.5
    share = narrow.mfu(causal=True) / wide.mfu(causal=True)
    assert share == pytest.approx(wide.total / narrow.total * 989.4 / 1978.9, rel=1e-3)


def test_a_search_offers_it_where_the_configuration_and_the_gpu_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(CONFIGS / "671b.yaml", RunConfig)
    plans = {
        gpu: make_plan(config, read_cluster(str(CONFIGS / "clusters" / f"{gpu}-256.yaml"))) for gpu in ("h100", "b200")
    }
    monkeypatch.setattr(searching, "_PRECISIONS", ("fp32", "bf16", "fp8"))
    assert searching.search(plans["h100"])[0].changes["train.precision"] == "fp8"
    assert not any(one.changes.get("train.precision") == "fp8" for one in searching.search(plans["b200"]))
    monkeypatch.setattr(searching, "_PRECISIONS", ("fp32", "bf16"))
    assert not any(one.changes.get("train.precision") == "fp8" for one in searching.search(plans["h100"]))


@pytest.mark.parametrize(("gpu", "goes"), [("H100", True), ("H800", True), ("H200", True), ("B200", False)])
def test_a_job_in_fp8_goes_on_gpus_that_the_engine_has_kernels_for(gpu: str, goes: bool) -> None:
    config = load(CONFIGS / "671b.yaml", RunConfig)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp8"})})
    cluster = read_cluster(str(CONFIGS / "clusters" / "h100-256.yaml"))
    told = [str(problem) for problem in cluster_problems(config, cluster, GPUS[gpu])]
    assert told == ([] if goes else ["train.precision: B200 computes in fp32, bf16 (got 'fp8')"])
