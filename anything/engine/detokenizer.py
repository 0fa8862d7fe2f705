"""Tokenizer of a model folder, and incremental detokenization; neither needs torch."""

from __future__ import annotations

import json

import tokenizers

from base import storage
from base.errors import MissingFileError, WeightsError

# A window is cut to one token when it is longer than this and ends with a whole character, so that the cost of
# decoding a token does not grow with the text.
_WINDOW_TOKENS = 16
# The replacement character that decoders write for incomplete UTF-8. One character has at most three bytes before its
# last one, and some decoders write one replacement for each.
_REPLACEMENT = "\ufffd"
_MAX_REPLACEMENTS = 3


class Tokenizer:
    """Tokenizer of a folder's tokenizer.json.

    Args:
        control_tokens: encode names of control tokens in a text as those tokens. By default they are plain text, as
            they are in a document of the training data: what a user writes neither ends nor poses as a turn.

    Raises:
        MissingFileError: the folder has none.
        WeightsError: it cannot be read.
    """

    def __init__(self, uri: str, *, control_tokens: bool = False) -> None:
        path = storage.join(uri, "tokenizer.json")
        if not storage.exists(path):
            raise MissingFileError(f"{path} does not exist. Export the model with its tokenizer.")
        try:
            content = storage.read_bytes(path).decode()
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
            self._encoder = self._tokenizer if control_tokens else _plain_text_encoder(content)
        except Exception as error:  # the library raises plain Exception
            raise WeightsError(f"{path} is no tokenizer.json: {error}. Copy or export it again.") from error
        # A prompt that is too long is refused, never cut.
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._bos_token = self._read_bos_token(uri)

    def _read_bos_token(self, uri: str) -> int | None:
        """Begin-of-sequence token, when the folder's tokenizer_config.json asks for one."""
        path = storage.join(uri, "tokenizer_config.json")
        if not storage.exists(path):
            return None
        described = storage.read_json(path)
        if not described.get("add_bos_token"):
            return None
        token = described.get("bos_token")
        content = token.get("content") if isinstance(token, dict) else token
        found = None if content is None else self._tokenizer.token_to_id(content)
        if found is None:
            raise WeightsError(f"{path} wants the token {content!r} first, which tokenizer.json does not have.")
        return int(found)

    @property
    def size(self) -> int:
        """Vocabulary size: one more than the highest token id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        tokens = list(self._encoder.encode(text).ids)
        if self._bos_token is not None and tokens[:1] != [self._bos_token]:
            tokens.insert(0, self._bos_token)
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _plain_text_encoder(content: str) -> tokenizers.Tokenizer:
    """Tokenizer of a tokenizer.json that encodes the names of its added tokens as plain text.

    Also those that are not marked special, as DeepSeek's role tokens are not; but not runs of blanks, which some
    vocabularies add for text.
    """
    described = json.loads(content)
    for token in described.get("added_tokens") or []:
        token["special"] = token["special"] or bool(token["content"].strip())
    encoder = tokenizers.Tokenizer.from_str(json.dumps(described))
    encoder.encode_special_tokens = True
    return encoder


class IncrementalDetokenizer:
    """Detokenizes a sequence token by token, in whole characters only.

    The pieces together are what the tokenizer decodes from all tokens at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        """Text that became complete with this token; may be empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        held = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_REPLACEMENTS)
        certain = len(text) - held
        piece = text[self._emitted : certain]
        self._emitted = max(self._emitted, certain)
        if not held and len(self._window) > _WINDOW_TOKENS:
            self._window = self._window[-1:]
            self._emitted = len(self._tokenizer.decode(self._window))
        return piece

    def finish(self) -> str:
        """Text that was held back as incomplete; no token follows."""
        return self._tokenizer.decode(self._window)[self._emitted :]
