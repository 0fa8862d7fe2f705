"""Encoding of documents: bos and eos, the chat template, fill-in-the-middle, and which tokens bear loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokenizers import Tokenizer

from cherry.data.corpus import ROLES, Document
from cherry.data.fim import Fim
from cherry.data.tokenizer import ROLE_TOKENS

# chat_template of DeepSeek-V3's released tokenizer_config.json: system text has no marker, and only assistant text ends
# with eos.
_DEEPSEEK_ROLES = ("<｜User｜>", "<｜Assistant｜>")


@dataclass(frozen=True)
class Encoded:
    """A document's tokens, from bos to eos.

    `bears` marks the tokens that bear loss: all of plain text; in a chat the assistant's text and the eos after it.
    `text` is the text of the loss-bearing tokens. `ends[i]` is the number of its characters that tokens 0 to i decode
    to, and None where token i ends inside a character.
    """

    tokens: list[int]
    bears: list[bool]
    text: str
    ends: list[int | None]


@dataclass(frozen=True)
class Template:
    """Chat template: the tokens before each role's text, and the roles whose text ends with eos."""

    before: dict[str, list[int]]
    closed: frozenset[str]


def template_of(tokenizer: Tokenizer) -> Template:
    """DeepSeek's chat template if the tokenizer has its role tokens; else `(role text eos)*`.

    In the latter a role is a special token of a tokenizer trained here, else the role's name and a line break.
    """
    user, assistant = (tokenizer.token_to_id(token) for token in _DEEPSEEK_ROLES)
    if user is not None and assistant is not None:
        return Template({"system": [], "user": [user], "assistant": [assistant]}, frozenset({"assistant"}))
    before = {}
    for role in ROLES:
        token = tokenizer.token_to_id(ROLE_TOKENS[role])
        before[role] = [token] if token is not None else tokenizer.encode(f"{role}\n", add_special_tokens=False).ids
    return Template(before, frozenset(ROLES))


def encode_filled(
    tokenizer: Tokenizer, documents: Sequence[Document], fim: Fim | None, *, bos_id: int, eos_id: int
) -> Iterator[Encoded]:
    """Encoded documents in order, those that `fim` cuts as prefix, suffix, middle; all of their tokens bear loss."""
    cuts = [fim.cut(document) if fim is not None else None for document in documents]
    plain = encode(
        tokenizer, [d for d, cut in zip(documents, cuts, strict=True) if cut is None], bos_id=bos_id, eos_id=eos_id
    )
    spans = [span for cut in cuts if cut is not None for span in cut]
    encodings = (encoding.ids for encoding in tokenizer.encode_batch_fast(spans, add_special_tokens=False))
    for document, cut in zip(documents, cuts, strict=True):
        if cut is None or fim is None:
            yield next(plain)
            continue
        prefix, middle, suffix = next(encodings), next(encodings), next(encodings)
        tokens = [bos_id, fim.begin, *prefix, fim.hole, *suffix, fim.end, *middle, eos_id]
        yield Encoded(tokens, [True] * len(tokens), document.text, [])


def encode(
    tokenizer: Tokenizer, documents: Sequence[Document], *, bos_id: int, eos_id: int, with_ends: bool = False
) -> Iterator[Encoded]:
    """Encoded documents in order. All texts are encoded in one call, which uses all cores.

    Args:
        with_ends: fill in `Encoded.ends`, which doubles the time; else it is empty.
    """
    template = template_of(tokenizer)
    turns = [document.messages or ((None, document.text),) for document in documents]
    texts = [text for document in turns for _, text in document]
    encode_all = tokenizer.encode_batch if with_ends else tokenizer.encode_batch_fast
    encodings = iter(encode_all(texts, add_special_tokens=False))
    for document in turns:
        tokens, bears, text = [bos_id], [document[0][0] is None], ""
        ends: list[int | None] = [0]
        for role, content in document:
            encoding = next(encodings)
            before = template.before[role] if role is not None else []
            after = [eos_id] if role is None or role in template.closed else []
            answers = role is None or role == "assistant"
            inner = encoding.ids
            tokens += [*before, *inner, *after]
            bears += [False] * len(before) + [answers] * (len(inner) + len(after))
            ends += [len(text)] * len(before)
            if answers and with_ends:
                ends += [
                    None if end is None else len(text) + end
                    for end in _ends_of_characters(encoding.offsets, len(content))
                ]
            else:
                ends += [len(text)] * len(inner)
            text += content if answers else ""
            ends += [len(text)] * len(after)
        yield Encoded(tokens, bears, text, ends if with_ends else [])


def _ends_of_characters(offsets: Sequence[tuple[int, int]], length: int) -> list[int | None]:
    """End offset of each token's last character; None where the next token completes that character."""
    if not offsets:
        return []
    return [*(end if start >= end else None for (_, end), (start, _) in pairwise(offsets)), length]
