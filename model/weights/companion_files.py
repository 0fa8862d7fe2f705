"""Files beside the weights of a folder: tokenizer, chat template and generation settings."""

from __future__ import annotations

import json
import logging
from typing import Any

from base import storage
from base.errors import MissingFileError, WeightsError
from model.model_config import ModelConfig

_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"

logger = logging.getLogger(__name__)


class SourceFiles:
    """Chat template and generation settings of the folder that a run started from; none of a folder that has none.

    Args:
        uri: the folder; `None` for a model that was trained from scratch.

    Raises:
        WeightsError: one of the files is damaged.
    """

    def __init__(self, uri: str | None) -> None:
        self.uri = uri
        self.generation = self._read(_GENERATION)
        self.chat_template = self._json(_TOKENIZER_CONFIG).get("chat_template")
        """As tokenizer_config.json has it: a template, or a list of named ones."""
        self.template_file = self._read(_TEMPLATE)
        self._json(_GENERATION)
        tokenizer = self._read(_TOKENIZER)
        self.special_tokens = None if tokenizer is None else special_tokens(tokenizer, f"{uri}/{_TOKENIZER}")

    def _read(self, name: str) -> bytes | None:
        if self.uri is None:
            return None
        try:
            return storage.read_bytes(storage.join(self.uri, name))
        except MissingFileError:
            return None

    def _json(self, name: str) -> dict[str, Any]:
        path, data = f"{self.uri}/{name}", self._read(name)
        try:
            value = {} if data is None else json.loads(data)
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{path} is not JSON: {error}. Copy it again, or remove it.") from error
        if not isinstance(value, dict):
            raise WeightsError(f"{path}: must be a JSON object (got {type(value).__name__}). Copy it again.")
        return value

    def for_tokens(self, tokens: dict[int, str]) -> SourceFiles:
        """These files, or none where the run's tokenizer has other special tokens: they name tokens and their ids."""
        if self.uri is None or self.special_tokens in (None, tokens):
            return self
        logger.warning(
            "%s: chat template and generation_config.json are not carried over: its tokenizer has other special tokens",
            self.uri,
        )
        return SourceFiles(None)


def special_tokens(tokenizer: bytes, path: str) -> dict[int, str]:
    """Text of the added tokens of a tokenizer.json by id.

    Raises:
        WeightsError: it is not a tokenizer.json; names `path`.
    """
    try:
        return {int(entry["id"]): str(entry["content"]) for entry in json.loads(tokenizer).get("added_tokens", [])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is no tokenizer.json: {error}. Name the file that `data` wrote.") from error


def write_companions(uri: str, config: ModelConfig, tokenizer_uri: str | None, source: SourceFiles) -> None:
    """Write what transformers and vLLM need beside the weights.

    Args:
        tokenizer_uri: a tokenizer.json, or the folder that holds one; `None` writes no tokenizer.
        source: chat template and generation settings of the folder that the weights come from.

    Raises:
        MissingFileError: no tokenizer there.
        WeightsError: it is not a tokenizer.json.
    """
    if tokenizer_uri is not None:
        path = tokenizer_uri if tokenizer_uri.endswith(".json") else storage.join(tokenizer_uri, _TOKENIZER)
        data = storage.read_bytes(path)
        added = special_tokens(data, path)
        source = source.for_tokens(added)
        storage.write_bytes(storage.join(uri, _TOKENIZER), data)
        described = _tokenizer_config(config, added)
        if source.chat_template is not None:
            described["chat_template"] = source.chat_template
        storage.write_json(storage.join(uri, _TOKENIZER_CONFIG), described)
        if source.template_file is not None:
            storage.write_bytes(storage.join(uri, _TEMPLATE), source.template_file)
    if source.generation is not None:
        storage.write_bytes(storage.join(uri, _GENERATION), source.generation)
    else:
        generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "do_sample": False}
        storage.write_json(storage.join(uri, _GENERATION), generation)


def _tokenizer_config(config: ModelConfig, added: dict[int, str]) -> dict[str, Any]:
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
    return described
