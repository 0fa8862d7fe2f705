"""The benchmark scores what compressed-tensors packs as that library reads it, and refuses what it cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from base.errors import WeightsError
from benchmarks.quantize_methods import Scores, put, windows
from benchmarks.quantize_peer import SAME_LOSS, read_packed, require_complete, require_same, run_peer, write_tokens
from cherry.data.prepare import HeldoutDocument
from model.calibration.int4_weight import Int4Weight
from model.numerics.formats import is_projection
from model.weights.pretrained import WeightsReader, load_pretrained, save_pretrained, state_to_hf
from model.weights.safetensors_file import write_file
from tests.model.conftest import random_model, random_tokens, small_config

compressed_tensors = pytest.importorskip("compressed_tensors")

# A dense layer, a mixture of experts, and MTP's. Rows of 16 to 96 channels: parts of a group, one, and two.
CONFIG = small_config(num_hidden_layers=2, n_routed_experts=4, hidden_size=48, intermediate_size=96)
GROUP = 48


def packed(weight_OI: Tensor) -> dict[str, Tensor]:
    """Tensors that compressed-tensors' own compressor makes of a weight, and the weight that it makes of those."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    columns = weight_OI.shape[1]
    size = min(GROUP, columns)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": size}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights, "format": "pack-quantized"})
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    # Not the scales that ours would take: some values are clipped.
    scale_OG = (weight_OI.float().unflatten(1, (-1, size)).abs().amax(2) / 6).to(torch.bfloat16)
    stored = library.compress({"weight": weight_OI, "weight_scale": scale_OG}, scheme)
    restored = library.decompress(dict(stored), scheme)["weight"]
    return {**stored, "restored": restored}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(CONFIG)
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, CONFIG))
    folder = tmp_path_factory.mktemp("model") / "export"
    save_pretrained(named, str(folder), CONFIG, dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def library(export: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Folder without MTP's layer, whose projections compressed-tensors packed, and the weights that it restores."""
    reader, stored, restored = WeightsReader(str(export)), {}, {}
    for name in reader.names:
        if name.startswith(f"model.layers.{CONFIG.num_hidden_layers}."):
            continue
        tensor = reader.read(name).clone()
        if is_projection(name):
            found = packed(tensor)
            tensor = found.pop("restored")
            stored |= {name.removesuffix("weight") + key: value for key, value in found.items()}
        else:
            stored[name] = tensor
        restored[name] = tensor
    folder = tmp_path_factory.mktemp("packed")
    write_file(str(folder / "model.safetensors"), stored)
    return folder, restored


def documents() -> list[HeldoutDocument]:
    rows = enumerate(random_tokens(CONFIG, 2, 21).tolist())
    return [HeldoutDocument(str(number), row, [True] * len(row), bytes=len(row), text="") for number, row in rows]


def test_a_packed_folder_is_scored_as_the_weights_that_the_library_restores(
    export: Path, library: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, restored = library
    found = dict(read_packed(folder, GROUP))
    require_complete(found, export, CONFIG.num_hidden_layers)
    plain, ours, theirs = (load_pretrained(str(export), dtype=torch.float32) for _ in range(3))
    ratio = put(ours, found.items())
    put(theirs, restored.items())
    for name, result in found.items():
        weight = result.dequantized() if isinstance(result, Int4Weight) else result
        # The library restores in the scales' type, bf16.
        assert torch.equal(weight.to(restored[name].dtype), restored[name]), name
    scores, same = Scores(), Scores()
    for document in documents():
        scores.add(document, plain, ours, 8)
        same.add(document, theirs, ours, 8)
    for name, (loss, tokens) in same.rounded.items():
        assert scores.rounded[name] == (loss, tokens)
        assert loss == pytest.approx(same.plain[name][0], rel=1e-3)
        assert abs(loss - scores.plain[name][0]) > 2 * abs(loss - same.plain[name][0])
    assert same.kl < scores.kl / 10
    assert 4.5 / 16 < ratio < 1


def test_a_folder_that_is_another_model_is_refused(export: Path, library: tuple[Path, dict[str, Tensor]]) -> None:
    found = dict(read_packed(library[0], GROUP))
    layers = CONFIG.num_hidden_layers
    expert, norm = "model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"
    with pytest.raises(WeightsError, match=f"lacks {expert}"):
        require_complete({name: one for name, one in found.items() if name != expert}, export, layers)
    with pytest.raises(WeightsError, match=r"has unknown extra\.weight"):
        require_complete({**found, "extra.weight": found[norm]}, export, layers)
    with pytest.raises(WeightsError, match=f"not all of them: {expert}"):
        require_complete({**found, expert: found[expert].dequantized()}, export, layers)


def test_other_ways_of_storing_are_refused(library: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = library
    with pytest.raises(WeightsError, match="one scale for 32 of 96 channels"):
        dict(read_packed(folder, 32))
    reader = WeightsReader(str(folder))
    stored = {name: reader.read(name).clone() for name in reader.names}
    name = next(one for one in stored if one.endswith(".weight_scale")).replace("_scale", "_zero_point")
    write_file(str(tmp_path / "model.safetensors"), {**stored, name: torch.zeros(1)})
    with pytest.raises(WeightsError, match=f"{name} must be"):
        dict(read_packed(tmp_path, GROUP))


def test_the_other_environment_gets_each_scored_token_with_what_is_before_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    calibration = list(random_tokens(CONFIG, 3, 8))
    given = documents()
    write_tokens(path, calibration, (one for document in given for one in windows(document, 8)))
    found = load_file(path)
    assert torch.equal(found["calibration_ST"], torch.stack(calibration))
    lengths = found["lengths_W"].tolist()
    assert lengths == [8, 8, 4] * 2
    tokens, targets = (torch.split(found[name], lengths) for name in ("tokens_N", "targets_N"))
    assert torch.cat([tokens[0], tokens[1], tokens[2], targets[2][-1:]]).tolist() == list(given[0].tokens)
    assert all(torch.equal(a[1:], b[:-1]) for a, b in zip(tokens, targets, strict=True))
    assert found["scored_N"].sum() == 40


def test_two_models_are_not_compared() -> None:
    require_same("the plain model", 3.9, 3.9 + SAME_LOSS / 2)
    for other in (3.9 + 2 * SAME_LOSS, float("nan")):
        with pytest.raises(SystemExit, match=r"the plain model is .* and 3\.90000 here"):
            require_same("the plain model", other, 3.9)


def test_a_failed_peer_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"llm_compressor\.py ended with 1"):
        run_peer(Path("/bin/false"), tmp_path, tmp_path / "tokens", tmp_path / "quantized", {})
