"""Fill-in-the-middle (FIM): which documents are reordered to prefix, suffix, middle, and where they are cut.

The format is PSM at document level, before packing (DeepSeek-V3, arXiv 2412.19437, section 4.1): bos, begin, prefix,
hole, suffix, end, middle, eos. Cuts fall between characters, so that a model also learns to continue from the middle of
a token (Bavarian et al., arXiv 2207.14255, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from base.errors import DataError
from cherry.data.corpus import Document, seeded
from cherry.job_config import DataConfig

TRAINED_TOKENS = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
_DEEPSEEK_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


@dataclass(frozen=True)
class Fim:
    """FIM settings: the share of documents, a seed, and the ids of the three FIM tokens. Cuts are deterministic."""

    rate: float
    seed: int
    begin: int
    hole: int
    end: int

    def cut(self, document: Document) -> tuple[str, str, str] | None:
        """Prefix, middle and suffix (each may be empty) of a document; `None` if it stays in its order."""
        if document.chat is not None or seeded(self.seed, "fim", document.id) >= self.rate * 2**64:
            return None
        places = len(document.text) + 1
        first, second = sorted(seeded(self.seed, f"fim-{cut}", document.id) % places for cut in ("a", "b"))
        return document.text[:first], document.text[first:second], document.text[second:]


def fim_of(tokenizer: Tokenizer, config: DataConfig) -> Fim | None:
    """FIM settings with a tokenizer's own FIM tokens; `None` at a rate of 0.

    Raises:
        DataError: the tokenizer has no FIM tokens.
    """
    if not config.fim_rate:
        return None
    for names in (_DEEPSEEK_TOKENS, TRAINED_TOKENS):
        ids = [number for name in names if (number := tokenizer.token_to_id(name)) is not None]
        if len(ids) == len(names):
            return Fim(config.fim_rate, config.seed, *ids)
    raise DataError(
        f"{config.tokenizer}: data.fim_rate {config.fim_rate:g} needs the tokens {', '.join(_DEEPSEEK_TOKENS)} or "
        f"{', '.join(TRAINED_TOKENS)}, which this tokenizer lacks. Set data.fim_rate=0, or give another tokenizer."
    )
