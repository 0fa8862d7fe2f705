"""Filling shards from files: every rank's part, whatever it is sharded by, from safetensors and from .pt files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from base.errors import WeightsError
from cherry.distributed.local_part import local_part
from cherry.loading import PickledWeights, load_weights
from model.model_config import PRESETS, ModelConfig
from model.numerics.formats import is_projection
from model.numerics.fp8_blocks import quantize_blocks
from model.transformer import DeepseekV3
from model.weights.hf_names import state_to_hf
from model.weights.pretrained import load_into, read_model_config, save_pretrained
from tests.cherry.fake_ranks import as_rank

RANKS = 4


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, str, dict[str, Tensor]]:
    """A folder in the release's fp8 format, and its weights in fp32."""
    sizes = {"vocab_size": 600, "hidden_size": 160, "moe_intermediate_size": 136, "num_hidden_layers": 2}
    config = ModelConfig(**{**PRESETS["tiny"], **sizes})
    model = DeepseekV3(config)
    model.init_weights(3)
    uri = str(tmp_path_factory.mktemp("release"))
    tensors = [pair for name, value in model.state_dict().items() for pair in state_to_hf(name, value, config)]
    save_pretrained(tensors, uri, config, dtype=torch.float8_e4m3fn, max_shard_bytes=500_000)
    load_into(model, uri)
    return config, uri, model.state_dict()


def shard(model: DeepseekV3, how: str) -> None:
    """Experts over one axis and everything over another, as training does; `how` is the experts' second dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "expert"))
    if how != "rows":
        for moe in model.moe_layers():
            for name, parameter in list(moe.experts.named_parameters()):
                half = torch.empty(parameter.shape[0] // 2, *parameter.shape[1:], device="meta")
                dtensor = DTensor.from_local(half, mesh["expert"], [Shard(0)], run_check=False)
                setattr(moe.experts, name, nn.Parameter(dtensor))
    place = (lambda p: Shard(1) if p.dim() == 3 else Shard(0)) if how == "experts, then width" else None
    mesh_of_shard = mesh["shard"] if how != "rows" else init_device_mesh("cpu", (RANKS,))
    for layer in [*model.layers, model]:
        fully_shard(layer, mesh=mesh_of_shard, shard_placement_fn=place)
    model.to_empty(device="cpu")


@pytest.mark.parametrize("how", ["rows", "experts, then experts", "experts, then width"])
def test_the_parts_of_all_ranks_are_the_whole(how: str, release: tuple[ModelConfig, str, dict[str, Tensor]]) -> None:
    config, uri, expected = release
    found = {name: torch.full_like(value, torch.nan) for name, value in expected.items()}
    for rank in range(RANKS):
        with as_rank(rank, RANKS):
            with torch.device("meta"):
                model = DeepseekV3(config)
            shard(model, how)
            load_weights(model, uri)
            for name, tensor in model.state_dict(keep_vars=True).items():
                local, box = local_part(tensor)
                found[name][tuple(slice(*bounds) for bounds in box)] = local.detach()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_a_pt_file_may_hold_fp8_blocks_too(release: tuple[ModelConfig, str, dict[str, Tensor]], tmp_path: Path) -> None:
    config, _, expected = release
    stored = {}
    for name, value in expected.items():
        for hf_name, part in state_to_hf(name, value, config):
            if is_projection(hf_name):
                stored[hf_name], stored[f"{hf_name}_scale_inv"] = quantize_blocks(part)
            else:
                stored[hf_name] = part.clone()
    path = str(tmp_path / "671b_model.pt")
    torch.save(stored, path)
    model = DeepseekV3(config)
    load_weights(model, path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    whole, box = PickledWeights(path).read_box("lm_head.weight", ((0, 600), (0, 160))), ((7, 9), (100, 160))
    assert torch.equal(PickledWeights(path).read_box("lm_head.weight", box), whole[7:9, 100:160])


def test_a_quantized_or_larger_folder_is_refused_for_training(
    release: tuple[ModelConfig, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    from model.quantize import quantize_folder

    config, uri, _ = release
    quantize_folder(uri, str(tmp_path / "int8"))
    with pytest.raises(WeightsError, match=r"unexpected model\.layers\.0\.self_attn\.\w+\.weight_scale "):
        load_weights(DeepseekV3(config), str(tmp_path / "int8"))
    smaller = DeepseekV3(config.model_copy(update={"n_routed_experts": 4, "n_group": 1, "topk_group": 1}))
    before = smaller.lm_head.weight.clone()
    with pytest.raises(WeightsError, match=r"unexpected model\.layers\.1\.mlp\.experts\.4\.gate_proj\.weight "):
        load_weights(smaller, uri)
    assert torch.equal(smaller.lm_head.weight, before)


def read_pt(path: Path, content: object) -> str:
    """Text of the error that the content of a .pt file raises."""
    torch.save(content, path)
    with pytest.raises(WeightsError) as caught:
        PickledWeights(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pt_file_of_another_structure_is_refused_in_one_line_that_names_the_key(tmp_path: Path) -> None:
    path, weights = tmp_path / "model.pt", {"model.norm.weight": torch.ones(4)}
    assert "under the key 'state_dict'" in read_pt(path, {"epoch": 3, "state_dict": weights})
    assert "got a Tensor under the key 0" in read_pt(path, {0: torch.ones(4)})
    assert "got a int under the key 'step'" in read_pt(path, {**weights, "step": 7})
    assert "got list" in read_pt(path, [torch.ones(4)])
    assert "model.state_dict()" in read_pt(path, nn.Linear(2, 2))
    assert "holds no tensors" in read_pt(path, {})


def test_a_pt_file_of_the_old_format_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model.norm.weight": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"model\.pt .*torch before 1\.6"):
        PickledWeights(str(path))
    path.write_bytes(b"not a file of torch")
    with pytest.raises(WeightsError, match=r"model\.pt is damaged"):
        PickledWeights(str(path))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_with_a_wrapper_s_prefix_are_refused_in_one_line_that_names_it(
    prefix: str, suffix: str, release: tuple[ModelConfig, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    config, _, expected = release
    names = {prefix + hf: part for name, value in expected.items() for hf, part in state_to_hf(name, value, config)}
    path = str(tmp_path / f"wrapped{suffix}")
    torch.save(names, path)
    with pytest.raises(WeightsError, match=f"begin with '{prefix}'") as caught:
        load_weights(DeepseekV3(config), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            ".layers.1.",
            ".layers.1._orig_mod.",
            "contain `_orig_mod.` of torch.compile, as in model.layers.1.",
        ),
        ("model.", "", "lack the prefix 'model.', as in "),
    ],
)
def test_names_that_were_changed_throughout_are_told_in_one_line(
    old: str, new: str, said: str, release: tuple[ModelConfig, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    config, _, expected = release
    names = {hf: part for name, value in expected.items() for hf, part in state_to_hf(name, value, config)}
    torch.save({name.replace(old, new): part for name, part in names.items()}, path := str(tmp_path / "renamed.pt"))
    with pytest.raises(WeightsError) as caught:
        load_weights(DeepseekV3(config), path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_weights_are_loaded_from_a_pt_file_and_code_in_one_is_not_run(released_weights, monkeypatch):
    folder, tensors = released_weights
    config = read_model_config(str(folder))[0]
    torch.save(tensors, folder / "671b_model.pt")
    loaded, expected = DeepseekV3(config), DeepseekV3(config)
    load_weights(loaded, str(folder / "671b_model.pt"))
    load_weights(expected, str(folder))
    for name, value in expected.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    monkeypatch.chdir(folder)
    torch.save({"model": Harmful()}, folder / "harmful.pt")
    with pytest.raises(WeightsError, match="holds more than tensors"):
        load_weights(loaded, str(folder / "harmful.pt"))
    assert not (folder / "harmed").exists()
    whole = (folder / "671b_model.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="cut"):
        load_weights(loaded, str(folder / "cut.pt"))
    torch.save({name: value for name, value in tensors.items() if "lm_head" not in name}, folder / "headless.pt")
    with pytest.raises(WeightsError, match=r"missing lm_head\.weight \(shape \[600, 32\]\)"):
        load_weights(loaded, str(folder / "headless.pt"))


class Harmful:
    """Unpickling it would make a directory in the working directory."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)
