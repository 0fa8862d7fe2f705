"""Owns weights on disk: sharded safetensors folders in Hugging Face's layout, read and written by URI.

It knows nothing of training state: optimizer and data position are a checkpoint's matter.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from base import storage
from base.errors import MissingFileError, WeightsError
from base.storage import Progress
from model.experts import Experts
from model.model_config import ModelConfig
from model.numerics.fp8_blocks import DTYPE as FP8
from model.numerics.fp8_blocks import SCALE_SUFFIX, quantize_blocks
from model.numerics.int8_layers import use_int8
from model.transformer import DeepseekV3
from model.weights.hf_config import config_from_hf, hf_config, text_config
from model.weights.hf_names import is_ignorable, is_projection, pieces, state_to_hf
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
    "write_tokenizer",
]

logger = logging.getLogger(__name__)

DEFAULT_SHARD_BYTES = 2 << 30
_BIAS_SUFFIX = "e_score_correction_bias"


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
    """The model that a folder holds, in evaluation mode.

    Of an int8 folder the int8 values and scales stay in memory, and are dequantized to `dtype` on use.

    Raises:
        MissingFileError, WeightsError, ConfigError: see `read_model_config` and `load_into`.
    """
    config, _ = read_model_config(uri)
    reader = WeightsReader(uri)
    with torch.device("meta"):
        model = DeepseekV3(config)
    use_int8(model, _quantized_modules(model, reader), dtype)
    # While it is on meta a cast costs nothing; biases and scales stay fp32.
    model.to(dtype).to_empty(device=device)
    for moe in model.moe_layers():
        moe.tokens_per_expert_E.zero_()
    _fill(model, reader)
    return model.eval()


def load_into(model: DeepseekV3, uri: str, *, on_progress: Progress | None = None) -> None:
    """Copy a folder's weights into `model`, whose own types and devices stay.

    Raises:
        MissingFileError: nothing there.
        WeightsError: lists all tensors that are missing, unexpected, of another shape or without their scales, and
            all files that are damaged.
    """
    _fill(model, WeightsReader(uri), on_progress)


def _fill(model: DeepseekV3, reader: WeightsReader, on_progress: Progress | None = None) -> None:
    state = model.state_dict()
    parts = [Part(name, tensor.shape, whole_box(tensor.shape), tensor) for name, tensor in state.items()]
    load_parts(parts, reader, model.config, on_progress=on_progress)


class Part(NamedTuple):
    """What one process holds of one entry of the model's state."""

    name: str
    shape: torch.Size
    """The whole entry's."""
    box: Box
    """Which part of it is here; it may be empty."""
    values: Tensor


def load_parts(
    parts: Iterable[Part],
    source: Source,
    config: ModelConfig,
    *,
    on_progress: Progress | None = None,
    max_gap_bytes: int = MAX_GAP_BYTES,
) -> None:
    """Fill parts of a model's state from `source`, and read no more than they need; types and devices stay.

    Args:
        parts: of all entries of the state, also of those that nothing is held of.
        max_gap_bytes: see model/weights/ranged_read.py.

    Raises:
        WeightsError: what does not fit, or is damaged; see `load_into`. Nothing was changed then.
        StorageError: reading failed.
    """
    if isinstance(source, WeightsReader):
        source.open_files()
    misfit = Misfit()
    wanted: set[str] = set()
    requests: list[Request] = []
    for part in parts:
        whole = torch.empty(part.shape, device="meta")
        for piece in pieces(part.name, part.shape, config):
            wanted.add(piece.hf_name)
            shape = tuple(whole[piece.part].shape)
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


def _problem(source: Source, name: str, expected: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """What keeps a stored tensor from filling one of the model's of this shape and type."""
    try:
        if (found := source.shape(name)) != expected:
            return f"wrong shape of {name}: the model has {list(expected)}, the file {list(found)}"
        if (stored := source.dtype(name)).is_floating_point != dtype.is_floating_point:
            return f"wrong type of {name}: the model has {dtype}, the file {stored} (integers need their scales)"
        return scale_problem(source, name)
    except WeightsError as error:
        return str(error)


def _shape_of(source: Source, name: str) -> tuple[int, ...] | None:
    try:
        return source.shape(name)
    except WeightsError:
        return None


def _overlap(index: tuple[int | slice, ...], part: Part) -> tuple[Tensor, Box] | None:
    """Where the stored tensor that is `whole[index]` meets a part: the target and the stored box; `None` if nowhere."""
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


def _quantized_modules(model: DeepseekV3, reader: WeightsReader) -> set[str]:
    """Modules of `model` (on meta) whose weights come with scales."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Experts):
            leaf, parameter = next(iter(module.named_parameters(recurse=False)))
            first = next(pieces(f"{name}.{leaf}", parameter.shape, model.config))
            if f"{first.hf_name}_scale" in reader:
                found.add(name)
    return found


def save_pretrained(
    tensors: Iterable[tuple[str, Tensor]],
    uri: str,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer_uri: str | None = None,
) -> None:
    """Write a folder that transformers, vLLM and `load_pretrained` load; its marker comes last.

    Args:
        tensors: released names and values (see `state_to_hf`), in any order. In the order of the model's state
            dict at most one shard is in memory at a time.
        dtype: of all weights but the selection biases, which are fp32. float8_e4m3fn is the release's own format:
            projections in fp8 blocks, everything else in bf16.
        tokenizer_uri: a tokenizer.json, or the folder that holds one, to put beside the weights.

    Raises:
        WeightsError: lists all tensors that are missing, unexpected or of another shape.
        DiskFullError, StorageError: a file could not be written. The folder stays without a marker.
    """
    storage.remove_tree(uri)
    storage.make_directory(uri)
    shards = _plan_shards(config, dtype, max_shard_bytes)
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
    write_index(uri, file_of)
    if tokenizer_uri is not None:
        write_tokenizer(uri, tokenizer_uri, config)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "do_sample": False}
    storage.write_json(storage.join(uri, "generation_config.json"), generation)
    storage.write_json(storage.join(uri, "config.json"), hf_config(config, dtype=dtype))
    storage.commit(uri, {"dtype": str(dtype).removeprefix("torch."), "files": len(shards)})


def _plan_shards(
    config: ModelConfig, dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> the weights it holds and their shapes, in the order of the state dict."""
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
    """A weight as it is written, on the CPU: one tensor, or fp8 values and their scales."""
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
    """Write the index of a folder whose files are all there; it states their total size."""
    total = 0
    for file in sorted(set(file_of.values())):
        total += sum(info.stop - info.start for info in SafetensorsFile(storage.join(uri, file)).tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(file_of)}
    storage.write_json(storage.join(uri, INDEX_NAME), index)


def write_tokenizer(uri: str, tokenizer_uri: str, config: ModelConfig) -> None:
    """Copy a tokenizer.json, and write the tokenizer_config.json that transformers and vLLM need beside it.

    Raises:
        MissingFileError: no tokenizer there.
        WeightsError: it is not a tokenizer.json.
    """
    if not tokenizer_uri.endswith(".json"):
        tokenizer_uri = storage.join(tokenizer_uri, "tokenizer.json")
    data = storage.read_bytes(tokenizer_uri)
    try:
        added = {int(entry["id"]): str(entry["content"]) for entry in json.loads(data).get("added_tokens", [])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{tokenizer_uri} is no tokenizer.json: {error}. Name the file that `data` wrote."
        ) from error
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        # Training puts it before every document (as the release does), so a prompt begins with it too.
        "add_bos_token": config.bos_token_id in added,
        "add_eos_token": False,
    }
    for key, token_id in (("bos_token", config.bos_token_id), ("eos_token", config.eos_token_id)):
        if token_id in added:
            described[key] = added[token_id]
    storage.write_bytes(storage.join(uri, "tokenizer.json"), data)
    storage.write_json(storage.join(uri, "tokenizer_config.json"), described)
