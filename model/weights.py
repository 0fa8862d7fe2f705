"""Owns weights on disk: sharded safetensors folders in Hugging Face's layout, read and written by URI.

It knows nothing of training state: optimizer and data position are a checkpoint's matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from base import storage
from base.errors import MissingFileError, WeightsError
from model.config import ModelConfig
from model.experts import Experts
from model.fp8 import SCALE_SUFFIX, dequantize_blocks, scale_shape
from model.int8 import use_int8
from model.layout import config_from_hf, hf_config, is_ignorable, pieces, state_to_hf
from model.safetensors_file import SafetensorsFile, TensorInfo, write_file
from model.transformer import DeepseekV3

__all__ = [
    "INDEX_NAME",
    "WeightsReader",
    "config_from_hf",
    "hf_config",
    "load_into",
    "load_pretrained",
    "read_model_config",
    "save_pretrained",
    "state_to_hf",
    "write_index",
    "write_tokenizer",
]

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
DEFAULT_SHARD_BYTES = 2 << 30
_BIAS_SUFFIX = "e_score_correction_bias"


class WeightsReader:
    """The tensors of one folder, whichever files they are in. Files are opened on first use.

    Raises:
        MissingFileError: the folder has neither an index nor a model.safetensors.
        WeightsError: the index cannot be read.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of = self._read_index()

    def _read_index(self) -> dict[str, str]:
        index = storage.join(self.uri, INDEX_NAME)
        if storage.exists(index):
            try:
                weight_map = storage.read_json(index)["weight_map"]
                return {str(name): str(file) for name, file in weight_map.items()}
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
                raise WeightsError(f"{index} is no safetensors index: {error}. Copy or export it again.") from error
        if storage.exists(storage.join(self.uri, _SINGLE_NAME)):
            return dict.fromkeys(self.file(_SINGLE_NAME).tensors, _SINGLE_NAME)
        raise MissingFileError(
            f"{self.uri} holds no weights: neither {INDEX_NAME} nor {_SINGLE_NAME} is there. "
            "Name a folder in Hugging Face's layout."
        )

    @property
    def names(self) -> list[str]:
        """Released names of all tensors, in the index's order."""
        return list(self._file_of)

    @property
    def files(self) -> list[str]:
        """File names, sorted."""
        return sorted(set(self._file_of.values()))

    def names_in(self, file: str) -> list[str]:
        """The tensors that one file holds."""
        return [name for name, holder in self._file_of.items() if holder == file]

    def file(self, name: str) -> SafetensorsFile:
        """One file of the folder, opened."""
        if name not in self._files:
            uri = storage.join(self.uri, name)
            try:
                self._files[name] = SafetensorsFile(uri)
            except MissingFileError as error:
                raise WeightsError(f"{uri} does not exist, but {INDEX_NAME} names it. Copy it again.") from error
        return self._files[name]

    def close(self, file: str) -> None:
        """Forget an open file, so that its mapped pages can go."""
        self._files.pop(file, None)

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor.

        Raises:
            WeightsError: no such tensor, or the index is wrong about its file; or see `SafetensorsFile`.
        """
        if name not in self._file_of:
            raise WeightsError(f"{self.uri} has no tensor {name}")
        file = self.file(self._file_of[name])
        if name not in file.tensors:
            raise WeightsError(f"{file.uri} has no tensor {name}, but {INDEX_NAME} says so. Export the folder again.")
        return file.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; see `info`."""
        return self.info(name).shape

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in the file's type; see `info`. Copy before writing to it."""
        self.info(name)
        return self.file(self._file_of[name]).read(name)

    def read_weight(self, name: str) -> Tensor:
        """Like `read`, and an fp8 tensor comes dequantized to fp32 by its block scales (see model/fp8.py).

        Raises:
            WeightsError: an fp8 tensor without scales of the right shape.
        """
        tensor = self.read(name)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        scale_name = name + SCALE_SUFFIX
        if scale_name not in self or self.shape(scale_name) != scale_shape(tensor.shape):
            found = list(self.shape(scale_name)) if scale_name in self else "none"
            raise WeightsError(
                f"{self.uri}: fp8 tensor {name} of shape {list(tensor.shape)} needs {scale_name} of shape "
                f"{list(scale_shape(tensor.shape))} (got {found}). Copy the folder again."
            )
        return dequantize_blocks(tensor, self.read(scale_name))

    def is_scale(self, name: str) -> bool:
        """Whether a tensor is the block scales of an fp8 tensor that is there too."""
        return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in self

    def __contains__(self, name: str) -> bool:
        return name in self._file_of


def read_model_config(uri: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The model configuration of a folder, and its whole config.json.

    Raises:
        MissingFileError: no config.json.
        WeightsError, ConfigError: see `config_from_hf`.
    """
    path = storage.join(uri, "config.json")
    try:
        raw = storage.read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not JSON: {error}. Copy or export it again.") from error
    return config_from_hf(raw, path), raw


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


def load_into(model: DeepseekV3, uri: str) -> None:
    """Copy a folder's weights into `model`, whose own types and devices stay.

    Raises:
        MissingFileError: nothing there.
        WeightsError: lists all tensors that are missing, unexpected or of another shape; or a file is damaged.
    """
    _fill(model, WeightsReader(uri))


@torch.no_grad()
def _fill(model: DeepseekV3, reader: WeightsReader) -> None:
    state = model.state_dict()
    plan = [(tensor, piece) for name, tensor in state.items() for piece in pieces(name, tensor.shape, model.config)]
    problems = []
    for tensor, piece in plan:
        expected = tuple(tensor[piece.part].shape)
        if piece.hf_name not in reader:
            problems.append(f"missing {piece.hf_name} (shape {list(expected)})")
        elif (found := reader.shape(piece.hf_name)) != expected:
            problems.append(f"wrong shape of {piece.hf_name}: the model has {list(expected)}, the file {list(found)}")
    wanted = {piece.hf_name for _, piece in plan}
    problems += [
        f"unexpected {name} (shape {list(reader.shape(name))})"
        for name in reader.names
        if name not in wanted and not is_ignorable(name, model.config) and not reader.is_scale(name)
    ]
    if problems:
        raise WeightsError(
            f"{reader.uri} does not fit the model: {len(problems)} tensors. Check that model and weights belong "
            "together:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    for tensor, piece in plan:
        tensor[piece.part].copy_(reader.read_weight(piece.hf_name))


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
        dtype: of all weights but the selection biases, which are fp32.
        tokenizer_uri: a tokenizer.json, or the folder that holds one, to put beside the weights.

    Raises:
        WeightsError: lists all tensors that are missing, unexpected or of another shape.
        DiskFullError, StorageError: a file could not be written. The folder stays without a marker.
    """
    storage.remove_tree(uri)
    storage.make_directory(uri)
    shards = _plan_shards(config, dtype, max_shard_bytes)
    home = {name: file for file, shapes in shards.items() for name in shapes}
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in shards}
    problems: list[str] = []
    for name, tensor in tensors:
        file = home.pop(name, None)
        if file is None:
            problems.append(f"unexpected, or given twice: {name}")
        elif tuple(tensor.shape) != shards[file][name]:
            problems.append(f"wrong shape of {name}: {list(tensor.shape)}, should be {list(shards[file][name])}")
        else:
            waiting[file][name] = tensor.detach().to("cpu", torch.float32 if name.endswith(_BIAS_SUFFIX) else dtype)
            if len(waiting[file]) == len(shards[file]):
                held = waiting.pop(file)
                write_file(storage.join(uri, file), {key: held[key] for key in shards[file]})
    problems += [f"missing {name}" for name in home]
    if problems:
        raise WeightsError(f"cannot write {uri}: the tensors do not fit the model:\n  " + "\n  ".join(problems))
    write_index(uri, {name: file for file, shapes in shards.items() for name in shapes})
    if tokenizer_uri is not None:
        write_tokenizer(uri, tokenizer_uri, config)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "do_sample": False}
    storage.write_json(storage.join(uri, "generation_config.json"), generation)
    storage.write_json(storage.join(uri, "config.json"), hf_config(config, dtype=dtype))
    storage.commit(uri, {"dtype": str(dtype).removeprefix("torch."), "files": len(shards)})


def _plan_shards(
    config: ModelConfig, dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> the tensors it holds and their shapes, in the order of the state dict."""
    with torch.device("meta"):
        state = DeepseekV3(config).state_dict()
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    room = max_shard_bytes
    for hf_name, tensor in _all_hf(state, config):
        itemsize = 4 if hf_name.endswith(_BIAS_SUFFIX) else dtype.itemsize
        size = math.prod(tensor.shape) * itemsize
        if size > room and groups[-1]:
            groups.append({})
            room = max_shard_bytes
        groups[-1][hf_name] = tuple(tensor.shape)
        room -= size
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


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
