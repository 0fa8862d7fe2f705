"""Pretrained folders: round trips, sharding, transformers' reading of them, and tensors that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from base import storage
from base.errors import MissingFileError, WeightsError
from model.model_config import ModelConfig
from model.numerics.formats import FORMATS
from model.quantize import quantize_folder
from model.transformer import DeepseekV3
from model.weights.pretrained import (
    Part,
    WeightsReader,
    load_into,
    load_parts,
    load_pretrained,
    read_model_config,
    save_pretrained,
    state_to_hf,
)
from model.weights.safetensors_file import write_file

Export = Callable[..., None]
MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]
MakeTokens = Callable[..., Tensor]

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def named(model: DeepseekV3) -> list[tuple[str, Tensor]]:
    return [pair for name, value in model.state_dict().items() for pair in state_to_hf(name, value, model.config)]


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None, "scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0}],
)
def test_export_and_import_are_bit_exact(
    place: str, changes: dict[str, Any], tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, export: Export
) -> None:
    uri = str(tmp_path / "export") if place == "local" else f"memory://{tmp_path.name}"
    model = make_model(make_config(**changes))
    export(model, uri)
    assert storage.is_committed(uri)
    files = [name for name in storage.list_names(uri) if name.endswith(".safetensors")]
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    loaded = load_pretrained(uri, dtype=torch.float32)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_bf16_export_keeps_the_bias_fp32(
    tmp_path: Path,
    make_config: MakeConfig,
    make_model: MakeModel,
    export: Export,
) -> None:
    model = make_model(make_config())
    export(model, str(tmp_path / "e"), dtype=torch.bfloat16)
    reader = WeightsReader(str(tmp_path / "e"))
    for name, tensor in named(model):
        kept = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert reader.info(name).dtype == kept
        assert torch.equal(reader.read(name), tensor.to(kept))
    loaded = load_pretrained(str(tmp_path / "e"), dtype=torch.bfloat16)
    bias = loaded.moe_layers()[0].e_score_correction_bias_E
    assert bias is not None
    assert bias.dtype == torch.float32
    assert loaded.lm_head.weight.dtype == torch.bfloat16


def test_a_folder_that_transformers_wrote_loads(
    tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens, export: Export
) -> None:
    transformers = pytest.importorskip("transformers")
    config = make_config(num_nextn_predict_layers=0, rope_scaling=YARN)
    ours = str(tmp_path / "ours")
    export(make_model(config), ours)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(ours, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_pretrained(str(tmp_path / "theirs"), dtype=torch.float32)
    tokens = make_tokens(config, 1, 70)
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(loaded(tokens).hidden_BTD), theirs(tokens).logits, atol=1e-4, rtol=0.0)


def test_an_export_with_mtp_loads_in_transformers(
    folder: str, make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = make_model(make_config()).eval()
    tokens = make_tokens(model.config, 2, 20)
    with torch.no_grad():
        difference = theirs(tokens).logits - model.logits(model(tokens).hidden_BTD)
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("given", ["", "/tokenizer.json"])
def test_tokenizer_travels_with_the_weights(
    given: str, tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, export: Export
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    export(make_model(make_config()), str(tmp_path / "e"), tokenizer_uri=f"{tmp_path}{given}")
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "e"))
    assert (loaded.bos_token, loaded.eos_token_id) == ("<bos>", 1)


def test_missing_wrong_and_unexpected_tensors_are_reported_at_once(
    tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, export: Export
) -> None:
    export(make_model(make_config()), str(tmp_path / "e"))
    other = make_model(make_config(num_hidden_layers=4, vocab_size=98))
    before = other.lm_head.weight.clone()
    with pytest.raises(WeightsError) as caught:
        load_into(other, str(tmp_path / "e"))
    text = str(caught.value)
    assert "missing model.layers.4.eh_proj.weight (shape [48, 96])" in text
    assert "wrong shape of lm_head.weight: the model has [98, 48], the file [97, 48]" in text
    assert "unexpected model.layers.3.eh_proj.weight" in text
    assert torch.equal(other.lm_head.weight, before), "nothing is copied when something does not fit"


def test_saving_refuses_what_does_not_fit_and_leaves_no_marker(
    tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, export: Export
) -> None:
    uri = str(tmp_path / "e")
    model = make_model(make_config())
    export(model, uri)
    tensors = [(name, tensor) for name, tensor in named(model) if name != "model.norm.weight"]
    tensors[0] = (tensors[0][0], tensors[0][1][:-1])
    tensors.append(("surplus", torch.zeros(1)))
    with pytest.raises(WeightsError) as caught:
        save_pretrained(tensors, uri, model.config, dtype=torch.float32)
    for part in ("missing model.norm.weight", "wrong shape of model.embed_tokens.weight", "surplus"):
        assert part in str(caught.value)
    assert not storage.is_committed(uri)
    with pytest.raises(MissingFileError):
        read_model_config(uri)


@pytest.mark.parametrize("written", [{}, {"num_nextn_predict_layers": 1}])
def test_a_folder_of_transformers_without_mtp_loads_without_it_and_says_so(
    written: dict[str, int], tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, export: Export, caplog: Any
) -> None:
    """transformers drops the MTP layer and writes num_nextn_predict_layers 1; older versions leave the key out."""
    model = make_model(make_config(num_nextn_predict_layers=0))
    uri = str(tmp_path / "e")
    export(model, uri)
    raw = storage.read_json(f"{uri}/config.json")
    del raw["num_nextn_predict_layers"]
    storage.write_json(f"{uri}/config.json", raw | written)
    config, _ = read_model_config(uri)
    assert config.num_nextn_predict_layers == 0
    assert "num_nextn_predict_layers" in caplog.text
    loaded = load_pretrained(uri, dtype=torch.float32)
    assert loaded.mtp is None
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_a_folder_with_mtp_keeps_it_where_config_json_leaves_the_key_out(folder: str) -> None:
    raw = storage.read_json(f"{folder}/config.json")
    del raw["num_nextn_predict_layers"]
    storage.write_json(f"{folder}/config.json", raw)
    assert load_pretrained(folder, dtype=torch.float32).mtp is not None


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "3", "[" * 100_000, "{", ""])
def test_a_config_json_that_is_no_object_is_refused(folder: str, content: str) -> None:
    (Path(folder) / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_pretrained(folder, dtype=torch.float32)


def test_the_language_model_of_kimi_k25_loads_unless_its_experts_are_packed_int4(folder: str) -> None:
    config, raw = read_model_config(folder)
    text = raw | {"model_type": "kimi_k2"}
    storage.write_json(f"{folder}/config.json", {"model_type": "kimi_k25", "text_config": text})
    assert load_pretrained(folder, dtype=torch.float32).config == config
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    outer = {"model_type": "kimi_k25", "text_config": text | {"quantization_config": packed}}
    storage.write_json(f"{folder}/config.json", outer)
    with pytest.raises(WeightsError, match=r"quantization_config .*pack-quantized"):
        load_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("place", ["local", "memory"])
def test_fp8_scales_in_e8m0_are_read(
    place: str, tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, export: Export
) -> None:
    """As in successors of V3.1: powers of two in one byte each."""
    uri = str(tmp_path / "e8m0") if place == "local" else f"memory://{tmp_path.name}-e8m0"
    model = make_model(make_config())
    export(model, uri, dtype=torch.float8_e4m3fn)
    reader = WeightsReader(uri)
    expected: dict[str, Tensor] = {}
    for file in reader.files:
        tensors = {name: reader.read(name) for name in reader.names_in(file)}
        for name in tensors:
            if reader.is_scale(name):
                tensors[name] = torch.full(tensors[name].shape, 2.0**-9).to(torch.float8_e8m0fnu)
                weight = name.removesuffix("_scale_inv")
                expected[weight] = tensors[weight].float() * 2.0**-9
        write_file(storage.join(uri, file), tensors)
    load_into(model, uri)
    loaded = dict(named(model))
    assert expected
    for name, value in expected.items():
        assert torch.equal(loaded[name], value), name


def with_type(folder: str, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Rewrite one tensor of the folder."""
    reader = WeightsReader(folder)
    file = reader.file_of(name).uri
    tensors = {held: reader.read(held).clone() for held in reader.names_in(file.rpartition("/")[2])}
    write_file(file, tensors | {name: change(tensors[name])})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_integers_under_a_weight_s_name_are_refused(folder: str, dtype: torch.dtype) -> None:
    with_type(folder, "model.layers.1.mlp.experts.0.up_proj.weight", lambda weight: weight.to(dtype))
    with pytest.raises(WeightsError, match=rf"experts\.0\.up_proj\.weight: .*the file {dtype} .*scales"):
        load_pretrained(folder, dtype=torch.float32)


def test_a_type_that_is_not_read_is_named_with_its_tensor(folder: str) -> None:
    file = Path(WeightsReader(folder).file_of("lm_head.weight").uri)
    # the same number of bytes a value as F32
    file.write_bytes(file.read_bytes().replace(b'"lm_head.weight":{"dtype":"F32"', b'"lm_head.weight":{"dtype":"U32"'))
    with pytest.raises(WeightsError, match=r"lm_head\.weight: type not supported: .*\(got 'U32'\)"):
        load_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("format_name", ["fp8", "fp8_block", "w4a16", "nvfp4"])
def test_quantized_weights_are_read_in_slices_from_remote_storage_too(
    format_name: str, tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, export: Export
) -> None:
    """Words, scales and shapes lie end to end like the rows of gate and up do; each slice takes its own part."""
    uri, source = f"memory://{tmp_path.name}", str(tmp_path / "plain")
    model = make_model(make_config(hidden_size=64, intermediate_size=256, q_lora_rank=128))
    export(model, source)
    quantize_folder(source, uri, format_name=format_name)
    whole = load_pretrained(uri, dtype=torch.float32)
    reader = WeightsReader(uri)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    for stored in (key for key in reader.names if key.startswith(name)):
        buffer = whole.state_dict()[f"layers.1.mlp.experts.stored_w13_EFD{stored.removeprefix(name)}"]
        assert torch.equal(buffer[5].chunk(2)[1].view(torch.uint8), reader.read(stored).view(torch.uint8)), stored
    entries = FORMATS[format_name].load(model.config).entries
    parts, expected = [], []
    for entry, tensor in whole.state_dict().items():
        box = tuple((size // 3, size - size // 4) for size in tensor.shape)
        local = tensor[tuple(slice(*bounds) for bounds in box)]
        parts.append(Part(entry, tensor.shape, box, torch.zeros_like(local)))
        expected.append(local)
    load_parts(parts, reader, model.config, entries=entries)
    for part, local in zip(parts, expected, strict=True):
        assert torch.equal(part.values, local), part.name


@pytest.mark.parametrize(
    ("format_name", "suffix", "change", "said"),
    [
        ("w4a16", "_packed", lambda words: words.long(), "the model has torch.int32, the file torch.int64"),
        ("nvfp4", "_scale", lambda scale: scale.float(), "the model has torch.float8_e4m3fn, the file torch.float32"),
        ("nvfp4", "_packed", lambda codes: codes[:, :-1], r"wrong shape of .*the model has \[32, 32\], the file"),
    ],
)
def test_stored_numbers_of_another_type_are_refused(
    format_name: str, suffix: str, change: Callable[[Tensor], Tensor], said: str, tmp_path: Path,
    make_config: MakeConfig, make_model: MakeModel, export: Export,
) -> None:  # fmt: skip
    target = str(tmp_path / "quantized")
    export(make_model(make_config(hidden_size=64)), str(tmp_path / "plain"))
    quantize_folder(str(tmp_path / "plain"), target, format_name=format_name)
    with_type(target, f"model.layers.1.mlp.experts.0.up_proj.weight{suffix}", change)
    with pytest.raises(WeightsError, match=rf"experts\.0\.up_proj\.weight{suffix}.*{said}|{said}"):
        load_pretrained(target, dtype=torch.float32)
