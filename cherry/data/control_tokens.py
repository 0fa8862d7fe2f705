"""Control tokens of a tokenizer, and which texts spell one."""

from __future__ import annotations

import re

from tokenizers import Tokenizer


class ControlTokens:
    """Every added token that is not just white space, whether the tokenizer calls it special or not."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
        self.ids = {number for number, content in added.items() if content.strip()}
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        """The tokenizer that makes control tokens of their names."""
        self.tokenizer.encode_special_tokens = False
        self._names = sorted((added[number] for number in self.ids), key=len, reverse=True)
        # With a normalizer, other characters may spell a token too: then the tokenizer itself has to look.
        self._exact = (
            re.compile("|".join(map(re.escape, self._names)) or "(?!)") if tokenizer.normalizer is None else None
        )

    def spelled(self, text: str) -> list[tuple[int, int]]:
        """Characters of `text` that would become control tokens, as (start, end)."""
        if self._exact is not None:
            return [match.span() for match in self._exact.finditer(text)]
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return [place for number, place in zip(encoding.ids, encoding.offsets, strict=True) if number in self.ids]

    def may_join(self, text: str) -> bool:
        """Whether `text` may become part of a control token's name together with what stands around it."""
        return bool(text) and any(
            text in name or any(text.endswith(name[:n]) or text.startswith(name[-n:]) for n in range(1, len(name)))
            for name in self._names
        )
