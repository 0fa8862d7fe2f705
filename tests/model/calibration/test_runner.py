"""Calibration of a folder, beside the whole model with the same weights; and that it goes on where it was stopped."""

from pathlib import Path

import pytest
import torch

from base.errors import InvalidInputError
from model.calibration.int4_weight import Int4Weight
from model.calibration.method import Method
from model.calibration.runner import calibrated, coverage_of
from model.calibration.token_rows import map_rows
from model.numerics.formats import is_projection
from model.transformer import DeepseekV3, next_tokens
from model.weights.hf_names import pieces
from model.weights.pretrained import load_pretrained
from tests.model.conftest import random_tokens, small_config

NEAREST = Method(group=16, gptq=False, search=False)
GPTQ = Method(group=16)
AWQ = Method(group=16, gptq=False, search=False, awq=True)


@pytest.fixture
def documents():
    tokens_BT = random_tokens(small_config(), 6, 24)
    return [*tokens_BT[:4], tokens_BT[4, :9], tokens_BT[5, :17]]


def with_results(folder, results):
    """Model of a folder with calibrated weights in place of its own."""
    model = load_pretrained(folder, dtype=torch.float32)
    left = dict(results)
    for name, entry in model.state_dict().items():
        for piece in pieces(name, entry.shape, model.config):
            if piece.hf_name in left:
                result = left.pop(piece.hf_name)
                entry[piece.part].copy_(result.dequantized() if isinstance(result, Int4Weight) else result)
    assert not left
    return model


@torch.no_grad()
def hidden_of(model: DeepseekV3, documents):
    """Hidden states [N, D] that the model's norm gets, and those that its MTP block's norm gets."""
    found = {"norm": [], "mtp.norm": []}
    for name, rows in found.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0][0]))
    model.train()  # MTP runs in training only; nothing else differs
    for document in documents:
        model(document[None], next_BT=next_tokens(document[None]))
    return [torch.cat(rows) for rows in found.values()]


def rows_at(work: Path, number: int, documents):
    return map_rows(work / f"hidden-{number:05}.bin", (sum(map(len, documents)), 48), torch.float32)


@pytest.mark.parametrize("method", [NEAREST, GPTQ, AWQ], ids=["nearest", "gptq", "awq"])
def test_blocks_see_what_the_model_with_the_rounded_weights_sees(bf16_folder, tmp_path, documents, method):
    work, last = tmp_path / "work", small_config().num_hidden_layers
    results, before_mtp = {}, None
    for name, result in calibrated(bf16_folder, documents, work, method):
        if before_mtp is None and name.startswith(f"model.layers.{last - 1}."):
            before_mtp = rows_at(work, last, documents).clone()
        results[name] = result
    expected = hidden_of(with_results(bf16_folder, results), documents)
    for found, hidden in zip((before_mtp, rows_at(work, last + 1, documents)), expected, strict=True):
        torch.testing.assert_close(found, hidden, rtol=1e-3, atol=1e-3)


def test_every_projection_is_rounded_and_nothing_else_changes(bf16_folder, tmp_path, documents):
    model = load_pretrained(bf16_folder, dtype=torch.float32)
    state = model.state_dict().items()
    names = [piece.hf_name for name, entry in state for piece in pieces(name, entry.shape, model.config)]
    results = dict(calibrated(bf16_folder, documents, tmp_path / "work", GPTQ))
    assert set(results) == {name for name in names if is_projection(name)}
    assert all(isinstance(result, Int4Weight) for result in results.values())


@pytest.mark.parametrize("kind", [".experts.", ".self_attn.o_proj", ".shared_experts."])
def test_only_what_is_wanted_is_rounded(bf16_folder, tmp_path, documents, kind):
    for method in (GPTQ, AWQ):
        work = tmp_path / str(method.awq)
        results = dict(calibrated(bf16_folder, documents, work, method, wanted=lambda name: kind in name))
        rounded = {name for name, result in results.items() if isinstance(result, Int4Weight)}
        assert rounded
        assert all(kind in name for name in rounded)
        assert method.awq or rounded == set(results)
        last = small_config().num_hidden_layers + 1
        expected = hidden_of(with_results(bf16_folder, results), documents)[1]
        torch.testing.assert_close(rows_at(work, last, documents), expected, rtol=1e-3, atol=1e-3)


def test_gptq_keeps_the_hidden_states_better_than_rounding(bf16_folder, tmp_path, documents):
    tokens = random_tokens(small_config(), 24, 64, seed=5)
    plain = hidden_of(load_pretrained(bf16_folder, dtype=torch.float32), tokens[16:])[0]
    errors = []
    for place, method in enumerate((NEAREST, GPTQ)):
        results = dict(calibrated(bf16_folder, list(tokens[:16]), tmp_path / str(place), method))
        errors.append((hidden_of(with_results(bf16_folder, results), tokens[16:])[0] - plain).square().mean())
    assert errors[1] < 0.8 * errors[0]


def test_a_stopped_calibration_goes_on_with_the_layer_after_the_last(bf16_folder, tmp_path, documents):
    whole = dict(calibrated(bf16_folder, documents, tmp_path / "whole", GPTQ))
    work, told = tmp_path / "stopped", []
    stopped = calibrated(bf16_folder, documents, work, GPTQ)
    next(name for name, _ in stopped if name.startswith("model.layers.1."))
    stopped.close()
    (work / "layer-00002").mkdir()
    (work / "layer-00002" / "part-00000.safetensors").write_bytes(b"half a file")
    before = {path: path.stat().st_mtime_ns for path in work.glob("layer-0000[01]/*")}
    again = dict(calibrated(bf16_folder, documents, work, GPTQ, on_progress=lambda line, _: told.append(line)))
    assert {path: path.stat().st_mtime_ns for path in work.glob("layer-0000[01]/*")} == before
    assert len(told) == 4
    assert list(again) == list(whole)
    for name, result in again.items():
        assert torch.equal(result.values_OI, whole[name].values_OI), name
        assert torch.equal(result.scale_OG, whole[name].scale_OG), name


def test_other_documents_or_another_method_start_anew(bf16_folder, tmp_path, documents):
    first = dict(calibrated(bf16_folder, documents, tmp_path, GPTQ))
    for changed, method in ((documents[:3], GPTQ), (documents, NEAREST)):
        other = dict(calibrated(bf16_folder, changed, tmp_path, method))
        assert any(not torch.equal(other[name].values_OI, first[name].values_OI) for name in first)


def test_each_expert_s_tokens_are_counted_and_few_are_topped_up(bf16_folder, tmp_path, documents):
    config, tokens, least = small_config(), sum(map(len, documents)), 40
    method = Method(group=16, min_expert_rows=least)
    results = dict(calibrated(bf16_folder, documents, tmp_path, method))
    coverage = coverage_of(tmp_path)
    assert all(torch.isfinite(result.scale_OG).all() for result in results.values())
    layers = range(config.first_k_dense_replace, config.num_hidden_layers + 1)
    assert [(one.layer, one.expert) for one in coverage] == [
        (layer, expert) for layer in layers for expert in range(config.n_routed_experts)
    ]
    for layer in layers:
        assert sum(one.tokens for one in coverage if one.layer == layer) == tokens * config.num_experts_per_tok
    assert all(one.borrowed == max(0, least - one.tokens) for one in coverage)
    assert any(one.borrowed for one in coverage)


def test_tokens_that_do_not_fit_the_model_are_refused(bf16_folder, tmp_path):
    with pytest.raises(InvalidInputError, match="no token"):
        next(calibrated(bf16_folder, [torch.empty(0, dtype=torch.int64)], tmp_path, GPTQ))
    with pytest.raises(InvalidInputError, match="must be 0 to 96"):
        next(calibrated(bf16_folder, [torch.tensor([3, 97])], tmp_path, GPTQ))
