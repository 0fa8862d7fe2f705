"""Calibration of a folder, beside the whole model with the same weights; and that it goes on where it was stopped."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from base import storage
from base.errors import InvalidInputError
from model.calibration.int4_weight import Int4Weight
from model.calibration.method import Method
from model.calibration.runner import IDENTITY_NAME, coverage_of, discard
from model.calibration.token_rows import map_rows
from model.numerics.formats import is_projection
from model.transformer import DeepseekV3, next_tokens
from model.weights.hf_names import pieces
from model.weights.pretrained import WeightsReader, load_pretrained, save_pretrained, state_to_hf
from tests.model.calibration.inputs import calibrated
from tests.model.conftest import random_model, random_tokens, small_config

NEAREST = Method(group=16, gptq=False, search=False)
GPTQ = Method(group=16)
AWQ = Method(group=16, gptq=False, search=False, awq=True)
# A dense layer, a mixture of experts, and MTP's.
CONFIG = small_config(num_hidden_layers=2, n_routed_experts=4, hidden_size=32)
MTP = CONFIG.num_hidden_layers


@pytest.fixture(scope="module")
def documents():
    tokens_BT = random_tokens(CONFIG, 6, 24)
    return [*tokens_BT[:4], tokens_BT[4, :9], tokens_BT[5, :17]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = random_model(CONFIG)
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, CONFIG))
    uri = str(tmp_path_factory.mktemp("model") / "export")
    save_pretrained(named, uri, CONFIG, dtype=torch.bfloat16, max_shard_bytes=30_000)
    return uri


class Calibrated(NamedTuple):
    work: Path
    results: dict
    before_mtp: torch.Tensor


def calibrate(folder, documents, work, method, **settings):
    results, before_mtp = {}, None
    for name, result in calibrated(folder, documents, work, method, **settings):
        if before_mtp is None and storage.is_committed(str(work / f"layer-{MTP - 1:05}")):
            before_mtp = rows_at(work, MTP, documents).clone()
        results[name] = result
    return Calibrated(work, results, before_mtp)


@pytest.fixture(scope="module")
def by_gptq(folder, documents, tmp_path_factory):
    return calibrate(folder, documents, tmp_path_factory.mktemp("gptq"), GPTQ)


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
    shape = (sum(map(len, documents)), CONFIG.hidden_size)
    return map_rows(work / f"hidden-{number:05}.bin", shape, torch.float32)


def check_hidden(found: Calibrated, folder, documents):
    """The hidden states that calibration ended with are those of the model with its results."""
    expected = hidden_of(with_results(folder, found.results), documents)
    torch.testing.assert_close(found.before_mtp, expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows_at(found.work, MTP + 1, documents), expected[1], rtol=1e-3, atol=1e-3)


def test_blocks_see_what_the_model_with_the_rounded_weights_sees(by_gptq, folder, documents):
    check_hidden(by_gptq, folder, documents)


def test_every_projection_is_rounded_and_nothing_else_changes(by_gptq, folder):
    assert set(by_gptq.results) == {name for name in WeightsReader(folder).names if is_projection(name)}
    assert all(isinstance(result, Int4Weight) for result in by_gptq.results.values())


@pytest.mark.parametrize("kind", ["_proj", ".experts.", ".self_attn.o_proj", ".shared_experts."])
def test_what_awq_folds_elsewhere_is_among_the_results(folder, tmp_path, documents, kind):
    found = calibrate(folder, documents, tmp_path, AWQ, wanted=lambda name: is_projection(name) and kind in name)
    rounded = {name for name, result in found.results.items() if isinstance(result, Int4Weight)}
    assert rounded == {name for name in WeightsReader(folder).names if is_projection(name) and kind in name}
    assert rounded < set(found.results)
    check_hidden(found, folder, documents)


def test_only_what_is_wanted_is_rounded(folder, tmp_path, documents):
    found = calibrate(folder, documents, tmp_path, NEAREST, wanted=lambda name: ".experts." in name)
    assert set(found.results) == {name for name in WeightsReader(folder).names if ".experts." in name}
    check_hidden(found, folder, documents)


def test_gptq_keeps_the_hidden_states_better_than_rounding(folder, tmp_path):
    tokens = random_tokens(CONFIG, 24, 64, seed=5)
    plain = hidden_of(load_pretrained(folder, dtype=torch.float32), tokens[16:])[0]
    errors = []
    for place, method in enumerate((NEAREST, GPTQ)):
        results = dict(calibrated(folder, list(tokens[:16]), tmp_path / str(place), method))
        errors.append((hidden_of(with_results(folder, results), tokens[16:])[0] - plain).square().mean())
    assert errors[1] < 0.8 * errors[0]


def test_a_stopped_calibration_goes_on_with_the_layer_after_the_last(by_gptq, folder, tmp_path, documents):
    whole = by_gptq.results
    work, told = tmp_path / "stopped", []
    stopped = calibrated(folder, documents, work, GPTQ)
    next(name for name, _ in stopped if name.startswith("model.layers.0."))
    stopped.close()
    (work / "layer-00001").mkdir()
    (work / "layer-00001" / "part-00000.safetensors").write_bytes(b"half a file")
    before = {path: path.stat().st_mtime_ns for path in work.glob("layer-00000/*")}
    again = dict(calibrated(folder, documents, work, GPTQ, on_progress=lambda line, _: told.append(line)))
    assert {path: path.stat().st_mtime_ns for path in work.glob("layer-00000/*")} == before
    assert told[0] == "resumed: 1 of 3 layers are calibrated"
    assert [line.split(",")[0] for line in told[1:]] == ["calibrated layer 2/3", "calibrated layer 3/3"]
    assert list(again) == list(whole)
    for name, result in again.items():
        assert torch.equal(result.values_OI, whole[name].values_OI), name
        assert torch.equal(result.scale_OG, whole[name].scale_OG), name


def test_other_documents_or_another_method_start_anew(folder, tmp_path, documents):
    (tmp_path / "notes.txt").write_text("not calibration's")
    found = []
    for changed, method in ((documents, NEAREST), (documents[:3], NEAREST), (documents[:3], AWQ), (documents, NEAREST)):
        results = dict(calibrated(folder, changed, tmp_path, method))
        assert rows_at(tmp_path, MTP + 1, changed).shape[0] == sum(map(len, changed))
        found.append(set(results))
    assert found[0] == found[1] == found[3] < found[2]
    assert (tmp_path / "notes.txt").exists()


def test_a_source_that_was_rewritten_in_the_same_sizes_starts_anew(folder, tmp_path, documents):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    work = tmp_path / "work"
    before = dict(calibrated(str(source), documents, work, NEAREST))
    reader = WeightsReader(folder)
    name = next(filter(is_projection, reader.names))
    shard, info = source / Path(reader.file_of(name).uri).name, reader.info(name)
    content = bytearray(shard.read_bytes())
    content[info.start : info.stop] = bytes(info.stop - info.start)
    shard.unlink()
    shard.write_bytes(content)
    after = dict(calibrated(str(source), documents, work, NEAREST))
    assert before[name].values_OI.any()
    assert not after[name].values_OI.any()


def test_a_work_directory_is_removed_with_what_is_its_own(folder, tmp_path, documents):
    for work in (tmp_path / "one", tmp_path / "two"):
        list(calibrated(folder, documents[:1], work, NEAREST))
    (tmp_path / "two" / "notes.txt").write_text("not calibration's")
    for work in (tmp_path / "one", tmp_path / "two", tmp_path / "none"):
        discard(work)
    assert [path.name for path in tmp_path.rglob("*")] == ["two", "notes.txt"]


def test_a_damaged_identity_starts_anew(folder, tmp_path, documents):
    list(calibrated(folder, documents[:1], tmp_path, NEAREST))
    (tmp_path / IDENTITY_NAME).write_text("{")
    told = []
    list(calibrated(folder, documents[:1], tmp_path, NEAREST, on_progress=lambda line, _: told.append(line)))
    assert len(told) == 3


def test_each_expert_s_tokens_are_counted(by_gptq, documents):
    coverage, tokens = coverage_of(by_gptq.work), sum(map(len, documents))
    layers = range(CONFIG.first_k_dense_replace, MTP + 1)
    assert [(one.layer, one.expert) for one in coverage] == [
        (layer, expert) for layer in layers for expert in range(CONFIG.n_routed_experts)
    ]
    for layer in layers:
        assert sum(one.tokens for one in coverage if one.layer == layer) == tokens * CONFIG.num_experts_per_tok
    # 4 tokens for each of 32 channels; all tokens together are fewer.
    assert all(one.tokens + one.borrowed == min(128, tokens) for one in coverage)


def test_tokens_that_do_not_fit_the_model_are_refused(folder, tmp_path):
    with pytest.raises(InvalidInputError, match="no token"):
        next(calibrated(folder, [torch.empty(0, dtype=torch.int64)], tmp_path, GPTQ))
    with pytest.raises(InvalidInputError, match="must be 0 to 96"):
        next(calibrated(folder, [torch.tensor([3, 97])], tmp_path, GPTQ))
