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
_OLD_TEMPLATE = "chat_template.json"
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
        if self.template_file is None and isinstance(old := self._json(_OLD_TEMPLATE).get("chat_template"), str):
            self.template_file = old.encode()
        self._json(_GENERATION)
        tokenizer = self._read(_TOKENIZER)
        self.special_tokens = None if tokenizer is None else special_tokens(tokenizer, f"{uri}/{_TOKENIZER}")

    @property
    def default_template(self) -> str | None:
        """The template that transformers takes unless another is named; `None` where there is none.

        Raises:
            WeightsError: the file is not UTF-8.
        """
        if self.template_file is not None:
            try:
                return self.template_file.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise WeightsError(f"{self.uri}/{_TEMPLATE}: must be UTF-8 text: {error}. Copy it again.") from error
        named = self.chat_template
        if isinstance(named, list):
            named = next((one.get("template") for one in named if one.get("name") == "default"), None)
        return named if isinstance(named, str) else None

    def _read(self, name: str) -> bytes | None:
        return None if self.uri is None else _read_if_there(storage.join(self.uri, name))

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


def _read_if_there(uri: str) -> bytes | None:
    """Content of a file; `None` where there is none."""
    try:
        return storage.read_bytes(uri)
    except MissingFileError:
        return None


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
        tokenizer_uri: a tokenizer.json, or the folder that holds one; `None` writes no tokenizer. A chat template
            beside it is the one that was trained with, and wins over the source's; generation settings beside it
            stand in for those of a source without any.
        source: chat template and generation settings of the folder that the weights come from.

    Raises:
        MissingFileError: no tokenizer there.
        WeightsError: it is not a tokenizer.json.
    """
    beside = None
    if tokenizer_uri is not None:
        path = tokenizer_uri if tokenizer_uri.endswith(".json") else storage.join(tokenizer_uri, _TOKENIZER)
        data = storage.read_bytes(path)
        added = special_tokens(data, path)
        source = source.for_tokens(added)
        storage.write_bytes(storage.join(uri, _TOKENIZER), data)
        described = _tokenizer_config(config, added)
        trained_with = _read_if_there(storage.join(_folder_of(path), _TEMPLATE))
        if source.chat_template is not None and trained_with is None:
            described["chat_template"] = source.chat_template
        storage.write_json(storage.join(uri, _TOKENIZER_CONFIG), described)
        beside = _read_if_there(storage.join(_folder_of(path), _GENERATION))
        template = source.template_file if trained_with is None else trained_with
        if template is not None:
            storage.write_bytes(storage.join(uri, _TEMPLATE), template)
    if (settings := source.generation or beside) is not None:
        storage.write_bytes(storage.join(uri, _GENERATION), settings)
    else:
        generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "do_sample": False}
        storage.write_json(storage.join(uri, _GENERATION), generation)


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0] or "."


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
