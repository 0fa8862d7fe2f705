"""Pretrained weights: sharded safetensors folders in Hugging Face's layout, loaded and saved by URI."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from base import storage
from base.errors import ConfigError, MissingFileError, WeightsError
from base.storage import Progress
from model.experts import Experts
from model.model_config import ModelConfig
from model.numerics.e4m3 import DTYPE as FP8
from model.numerics.formats import FORMATS, QuantizationFormat, StoredEntry, detect_format, is_projection
from model.numerics.fp8_blocks import SCALE_SUFFIX, quantize_blocks
from model.transformer import DeepseekV3
from model.weights.companion_files import SourceFiles, write_companions
from model.weights.hf_config import config_from_hf, hf_config, text_config
from model.weights.hf_names import Piece, is_ignorable, pieces, state_to_hf
from model.weights.misfit import Misfit
from model.weights.ranged_read import MAX_GAP_BYTES, Request, fill
from model.weights.reader import INDEX_NAME, Source, WeightsReader, is_scale, scale_problem
from model.weights.safetensors_file import Box, SafetensorsFile, whole_box, write_file

__all__ = [
    "INDEX_NAME",
    "Part",
    "WeightsReader",
    "config_from_hf",
    "hf_config",
    "load_into",
    "load_parts",
    "load_pretrained",
    "read_model_config",
    "save_pretrained",
    "state_to_hf",
    "write_index",
]

logger = logging.getLogger(__name__)

DEFAULT_SHARD_BYTES = 2 << 30
_BIAS_SUFFIX = "e_score_correction_bias"
_PLAIN: Mapping[str, StoredEntry] = MappingProxyType({})


def read_model_config(uri: str) -> tuple[ModelConfig, dict[str, Any]]:
    """ModelConfig of a folder, and its whole config.json (of Kimi-K2.5, the language model's).

    A folder whose weights have no MTP layer has a model without one, whatever config.json says: transformers neither
    loads nor saves that layer, but writes `num_nextn_predict_layers` 1 by default.

    Raises:
        MissingFileError: no config.json.
        WeightsError, ConfigError: see `config_from_hf`.
    """
    path = storage.join(uri, "config.json")
    try:
        raw = storage.read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}. Copy or export it again.") from error
    config = config_from_hf(raw, path)
    if config.num_nextn_predict_layers and _lacks_mtp(uri, config):
        logger.warning("%s: the weights have no MTP layer, so num_nextn_predict_layers 1 is taken as 0", uri)
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    return config, text_config(raw)


def _lacks_mtp(uri: str, config: ModelConfig) -> bool:
    """Whether a folder holds weights of the model's last layer and none of the MTP layer behind it."""
    try:
        names = WeightsReader(uri).names
    except MissingFileError:
        return False
    last, mtp = (f"model.layers.{config.num_hidden_layers + offset}." for offset in (-1, 0))
    return any(name.startswith(last) for name in names) and not any(name.startswith(mtp) for name in names)


def load_pretrained(uri: str, *, dtype: torch.dtype, device: str | torch.device = "cpu") -> DeepseekV3:
    """Model of a folder, in evaluation mode.

    A folder in a registered quantization format (model/numerics/formats.py), DeepSeek's fp8 blocks among them, stays
    quantized in memory and computes in `dtype`; `load_into` makes plain weights of fp8 blocks.

    Raises:
        MissingFileError, WeightsError, ConfigError: see `read_model_config` and `load_into`.
        ConfigError: the folder's format cannot run on `device`.
    """
    config, raw_config = read_model_config(uri)
    reader = WeightsReader(uri)
    with torch.device("meta"):
        model = DeepseekV3(config)
    entries = _PLAIN
    if (format_name := detect_format(raw_config, storage.join(uri, "config.json"))) is not None:
        _check_device(format_name, torch.device(device), uri)
        quantization = FORMATS[format_name].load(config)
        _replace_modules(model, reader, quantization, dtype)
        entries = quantization.entries
    # While it is on meta a cast costs nothing; biases and scales stay fp32.
    model.to(dtype).to_empty(device=device)
    for moe in model.moe_layers():
        moe.tokens_per_expert_E.zero_()
    _fill(model, reader, entries)
    return model.eval()


def _check_device(format_name: str, device: torch.device, uri: str) -> None:
    """Refuse a device that lacks what the format's modules run on."""
    needed = FORMATS[format_name].min_compute_capability
    if needed is None:
        return
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < needed:
        got = device.type if found is None else f"a GPU of {found[0]}.{found[1]}"
        raise ConfigError(
            f"{uri}: weights in the format {format_name} need a GPU of compute capability {needed[0]}.{needed[1]} or "
            f"newer (got {got}). Load the plain weights, or another format."
        )


def load_into(model: DeepseekV3, uri: str, *, on_progress: Progress | None = None) -> None:
    """Copy a folder's plain or fp8 block weights into `model`, whose own types and devices stay.

    Raises:
        MissingFileError: nothing there.
        WeightsError: lists all tensors that are missing, unexpected, of another shape or without their scales, and
            all files that are damaged.
    """
    _fill(model, WeightsReader(uri), _PLAIN, on_progress)


def _fill(
    model: DeepseekV3, reader: WeightsReader, entries: Mapping[str, StoredEntry], on_progress: Progress | None = None
) -> None:
    state = model.state_dict()
    parts = [Part(name, tensor.shape, whole_box(tensor.shape), tensor) for name, tensor in state.items()]
    load_parts(parts, reader, model.config, entries=entries, on_progress=on_progress)


class Part(NamedTuple):
    """Local slice of one entry of the model's state, as one process holds it."""

    name: str
    shape: torch.Size
    """Shape of the unsharded entry."""
    box: Box
    """Bounds of the local slice in the entry; it may be empty."""
    values: Tensor


def load_parts(
    parts: Iterable[Part],
    source: Source,
    config: ModelConfig,
    *,
    entries: Mapping[str, StoredEntry] = _PLAIN,
    on_progress: Progress | None = None,
    max_gap_bytes: int = MAX_GAP_BYTES,
) -> None:
    """Fill local slices of a model's state from `source`, reading only the bytes they need; types and devices stay.

    Args:
        parts: slices of all entries of the state, empty ones included.
        entries: how the entries of quantized modules are stored, by the last part of their name.
        max_gap_bytes: see model/weights/ranged_read.py.

    Raises:
        WeightsError: what does not fit, or is damaged; see `load_into`. Nothing was changed then.
        StorageError: reading failed.
    """
    source.open_files()
    misfit = Misfit()
    wanted: set[str] = set()
    requests: list[Request] = []
    for part in parts:
        entry = torch.empty(part.shape, device="meta")
        for piece in _pieces(part, config, entries):
            wanted.add(piece.hf_name)
            shape = tuple(entry[piece.part].shape)
            if piece.hf_name not in source:
                misfit.missing[piece.hf_name] = shape
            elif (problem := _problem(source, piece.hf_name, shape, part.values.dtype)) is not None:
                misfit.wrong[problem] = None
            elif (overlap := _overlap(piece.part, part)) is not None:
                target, box = overlap
                requests.append(Request(piece.hf_name, box, target))
    for name in source.names:
        if name in wanted or is_ignorable(name, config) or is_scale(source, name):
            continue
        # transformers writes tensors without elements for a model without shared experts.
        if (found := _shape_of(source, name)) is None or 0 not in found:
            misfit.unexpected[name] = found
    misfit.raise_if_any(source.uri, source.names, config)
    fill(source, requests, on_progress=on_progress, max_gap_bytes=max_gap_bytes)


def _pieces(part: Part, config: ModelConfig, entries: Mapping[str, StoredEntry]) -> Iterator[Piece]:
    """Released tensors of one state entry, plain or quantized."""
    stem, _, leaf = part.name.rpartition(".")
    if leaf in entries:
        parameter, suffix = entries[leaf]
        return pieces(f"{stem}.{parameter}", part.shape, config, suffix)
    return pieces(part.name, part.shape, config)


def _problem(source: Source, name: str, expected: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Reason why a stored tensor cannot fill an entry of this shape and type; `None` when it can."""
    try:
        if (found := source.shape(name)) != expected:
            return f"wrong shape of {name}: the model has {list(expected)}, the file {list(found)}"
        stored = source.dtype(name)
        as_stored = dtype == FP8 or not dtype.is_floating_point
        if stored != dtype if as_stored else not stored.is_floating_point:
            return f"wrong type of {name}: the model has {dtype}, the file {stored} (integers need their scales)"
        return None if as_stored else scale_problem(source, name)
    except WeightsError as error:
        return str(error)


def _shape_of(source: Source, name: str) -> tuple[int, ...] | None:
    try:
        return source.shape(name)
    except WeightsError:
        return None


def _overlap(index: tuple[int | slice, ...], part: Part) -> tuple[Tensor, Box] | None:
    """Overlap of a stored tensor (`entry[index]`) with a local slice: target view and stored box; `None` if empty."""
    inside: list[int | slice] = []
    stored: list[tuple[int, int]] = []
    for dim, (first, last) in enumerate(part.box):
        bounds = index[dim] if dim < len(index) else slice(None)
        if isinstance(bounds, int):
            if not first <= bounds < last:
                return None
            inside.append(bounds - first)
            continue
        begin, end, _ = bounds.indices(part.shape[dim])
        low, high = max(begin, first), min(end, last)
        if low >= high:
            return None
        inside.append(slice(low - first, high - first))
        stored.append((low - begin, high - begin))
    return part.values[tuple(inside)], tuple(stored)


def _replace_modules(
    model: DeepseekV3, reader: WeightsReader, quantization: QuantizationFormat, dtype: torch.dtype
) -> None:
    """Replace every linear layer and experts module of `model` (on meta) that the folder stores quantized."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Experts)]
    for name, module in modules:
        leaf, parameter = next(iter(module.named_parameters(recurse=False)))
        hf_name = next(pieces(f"{name}.{leaf}", parameter.shape, model.config)).hf_name
        if (quantized := quantization.replacement(hf_name, module, dtype)) is None:
            continue
        entries = (quantization.entries[entry] for entry, _ in quantized.named_buffers(recurse=False))
        if all(hf_name + entry.suffix in reader for entry in entries if entry.parameter == leaf):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, quantized)


def save_pretrained(
    tensors: Iterable[tuple[str, Tensor]],
    uri: str,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer_uri: str | None = None,
    source_uri: str | None = None,
) -> None:
    """Write a folder that transformers, vLLM and `load_pretrained` load; its marker is written last.

    Args:
        tensors: released names and values (see `state_to_hf`), in any order. In the order of the model's state
            dict at most one shard is in memory at a time.
        dtype: type of all weights but the selection biases, which are fp32. float8_e4m3fn is the release's own format:
            projections in fp8 blocks, everything else in bf16.
        tokenizer_uri: a tokenizer.json, or the folder that holds one, to copy beside the weights.
        source_uri: a folder whose generation_config.json and chat template are copied, unless the tokenizer has other
            special tokens.

    Raises:
        WeightsError: lists all tensors that are missing, unexpected or of another shape; or a file to copy is damaged.
        DiskFullError, StorageError: a file could not be written. The folder stays without a marker.
    """
    source = SourceFiles(source_uri)
    storage.remove_tree(uri)
    storage.make_directory(uri)
    shards = _plan_shards(config, dtype, max_shard_bytes)
    write_index(uri, _write_shards(tensors, uri, shards, dtype))
    write_companions(uri, config, tokenizer_uri, source)
    storage.write_json(storage.join(uri, "config.json"), hf_config(config, dtype=dtype))
    storage.commit(uri, {"dtype": str(dtype).removeprefix("torch."), "shards": len(shards)})


def _write_shards(
    tensors: Iterable[tuple[str, Tensor]],
    uri: str,
    shards: Mapping[str, Mapping[str, tuple[int, ...]]],
    dtype: torch.dtype,
) -> dict[str, str]:
    """File of each stored tensor; every file is written as soon as all of its weights have come.

    Raises:
        WeightsError: see `save_pretrained`.
    """
    home = {name: file for file, shapes in shards.items() for name in shapes}
    waiting: dict[str, dict[str, dict[str, Tensor]]] = {file: {} for file in shards}
    missing, problems = set(home), []
    file_of: dict[str, str] = {}
    for name, tensor in tensors:
        file = home.get(name)
        if file is None or name not in missing:
            problems.append(f"unexpected, or given twice: {name}")
            continue
        missing.discard(name)
        if tuple(tensor.shape) != shards[file][name]:
            problems.append(f"wrong shape of {name}: {list(tensor.shape)}, should be {list(shards[file][name])}")
            continue
        waiting[file][name] = dict(_stored(name, tensor.detach(), dtype))
        if len(waiting[file]) == len(shards[file]):
            held = waiting.pop(file)
            stored = {key: value for weight in shards[file] for key, value in held.pop(weight).items()}
            write_file(storage.join(uri, file), stored)
            file_of |= dict.fromkeys(stored, file)
    problems += [f"missing {name}" for name in home if name in missing]
    if problems:
        raise WeightsError(f"cannot write {uri}: the tensors do not fit the model:\n  " + "\n  ".join(problems))
    return file_of


def _plan_shards(
    config: ModelConfig, dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Weights of each file and their shapes, in state dict order."""
    with torch.device("meta"):
        state = DeepseekV3(config).state_dict()
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    room = max_shard_bytes
    for hf_name, tensor in _all_hf(state, config):
        size = math.prod(tensor.shape) * _stored_dtype(hf_name, dtype).itemsize  # scales are 1/4096 of it
        if size > room and groups[-1]:
            groups.append({})
            room = max_shard_bytes
        groups[-1][hf_name] = tuple(tensor.shape)
        room -= size
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _stored_dtype(hf_name: str, dtype: torch.dtype) -> torch.dtype:
    if hf_name.endswith(_BIAS_SUFFIX):
        return torch.float32
    return torch.bfloat16 if dtype == FP8 and not is_projection(hf_name) else dtype


def _stored(hf_name: str, tensor: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Tensors that one weight is stored as, on the CPU: itself, or fp8 values and their scales."""
    stored_dtype = _stored_dtype(hf_name, dtype)
    if stored_dtype != FP8:
        yield hf_name, tensor.to("cpu", stored_dtype)
        return
    values, scale = quantize_blocks(tensor)
    yield hf_name, values.cpu()
    yield hf_name + SCALE_SUFFIX, scale.cpu()


def _all_hf(state: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        yield from state_to_hf(name, tensor, config)


def write_index(uri: str, file_of: Mapping[str, str]) -> None:
    """Write the index of a folder whose files are complete, with their total size."""
    total = 0
    for file in sorted(set(file_of.values())):
        total += sum(info.stop - info.start for info in SafetensorsFile(storage.join(uri, file)).tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(file_of)}
    storage.write_json(storage.join(uri, INDEX_NAME), index)
