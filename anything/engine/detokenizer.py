"""Owns text to tokens and back for one model folder, and text that grows a token at a time.

It knows nothing of models, and needs no torch.
"""

from __future__ import annotations

import tokenizers

from base import storage
from base.errors import MissingFileError, WeightsError

# A window is cut to one token when it is longer than this and ends with a whole character: decoding a token then
# costs the same however long the text is.
_WINDOW_TOKENS = 16
# What decoders put for bytes that are no character, or not yet. One character has at most three bytes before its
# last one, and some decoders write one mark for each.
_MARK = "\ufffd"
_MARKS_HELD = 3


class Tokenizer:
    """The tokenizer.json of a folder.

    Raises:
        MissingFileError: the folder has none.
        WeightsError: it cannot be read.
    """

    def __init__(self, uri: str) -> None:
        path = storage.join(uri, "tokenizer.json")
        if not storage.exists(path):
            raise MissingFileError(f"{path} does not exist. Export the model with its tokenizer.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(storage.read_bytes(path).decode())
        except Exception as error:  # the library raises plain Exception
            raise WeightsError(f"{path} is no tokenizer.json: {error}. Copy or export it again.") from error
        self._first = self._begin_token(uri)

    def _begin_token(self, uri: str) -> int | None:
        """The token that every text begins with, when the folder's tokenizer_config.json asks for one."""
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
        """One more than the highest token."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        tokens = list(self._tokenizer.encode(text).ids)
        if self._first is not None and tokens[:1] != [self._first]:
            tokens.insert(0, self._first)
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class GrowingText:
    """Text that becomes longer by a token at a time; never gives out a part of a character.

    The pieces together are what the tokenizer makes of all tokens at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were given out

    def push(self, token: int) -> str:
        """The text that is certain since the last call; may be empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        held = min(len(text) - len(text.rstrip(_MARK)), _MARKS_HELD)
        certain = len(text) - held
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if not held and len(self._window) > _WINDOW_TOKENS:
            self._window = self._window[-1:]
            self._given = len(self._tokenizer.decode(self._window))
        return piece

    def finish(self) -> str:
        """What was held back: no token follows, so it is no part of a character any more."""
        return self._tokenizer.decode(self._window)[self._given :]
