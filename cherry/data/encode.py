"""Encoding of documents: bos and eos, chat templates, fill-in-the-middle, and which tokens bear loss."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokenizers import Encoding, Tokenizer

from base.errors import DataError
from cherry.data.chat_template import ChatTemplate, Rendered
from cherry.data.control_tokens import ControlTokens
from cherry.data.corpus import Document
from cherry.data.fim import Fim
from cherry.data.tokenizer_files import default_template


@dataclass(frozen=True)
class Encoded:
    """A document's tokens, from bos to eos.

    `bears` marks the tokens that bear loss: all of plain text; in a chat the assistant's text and the token that ends
    it. `text` is the text of the loss-bearing tokens but for control tokens. `ends[i]` is the number of its characters
    that tokens 0 to i decode to, and None where token i ends inside a character.
    """

    tokens: list[int]
    bears: list[bool]
    text: str
    ends: list[int | None]


@dataclass(frozen=True)
class _Piece:
    """A token: its id and its characters in the rendered conversation."""

    id: int
    start: int
    end: int


class Encoder:
    """Documents to tokens. No text of a document or a message becomes a control token; only a template writes those.

    Args:
        template: for conversations; `None` takes the default for this tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, *, bos_id: int, eos_id: int, template: ChatTemplate | None = None) -> None:
        self._control = ControlTokens(tokenizer)
        self.control_ids = self._control.ids
        self.turn_ends: set[int] = set()
        """Control tokens that ended a turn of the assistant so far, where a model is to stop."""
        self._bos_id, self._eos_id = bos_id, eos_id
        self._text = _text_only(tokenizer)
        self.template = template or default_template(tokenizer, bos_id=bos_id, eos_id=eos_id)

    def encode_filled(self, documents: Sequence[Document], fim: Fim | None) -> Iterator[Encoded]:
        """Encoded documents in order, those that `fim` cuts as prefix, suffix, middle; all of these bear loss."""
        cuts = [fim.cut(document) if fim is not None else None for document in documents]
        plain = self.encode([d for d, cut in zip(documents, cuts, strict=True) if cut is None])
        spans = [span for cut in cuts if cut is not None for span in cut]
        encodings = (encoding.ids for encoding in self._text.encode_batch_fast(spans, add_special_tokens=False))
        for document, cut in zip(documents, cuts, strict=True):
            if cut is None or fim is None:
                yield next(plain)
                continue
            prefix, middle, suffix = next(encodings), next(encodings), next(encodings)
            tokens = [self._bos_id, fim.begin, *prefix, fim.hole, *suffix, fim.end, *middle, self._eos_id]
            yield Encoded(tokens, [True] * len(tokens), document.text, [])

    def encode(self, documents: Sequence[Document], *, with_ends: bool = False) -> Iterator[Encoded]:
        """Encoded documents in order. All texts are encoded in one call, which uses all cores.

        Args:
            with_ends: fill in `Encoded.ends`, which doubles the time; else it is empty.

        Raises:
            DataError: the template does not take a conversation.
        """
        chats = {
            place: self.template.render(document.chat, document.id, self._control)
            for place, document in enumerate(documents)
            if document.chat is not None
        }
        encode_all = self._text.encode_batch if with_ends else self._text.encode_batch_fast
        texts = [d.text for place, d in enumerate(documents) if place not in chats]
        plain = iter(encode_all(texts, add_special_tokens=False))
        turns = iter(
            self._control.tokenizer.encode_batch([chat.disguised for chat in chats.values()], add_special_tokens=False)
        )
        for place, document in enumerate(documents):
            if place in chats:
                yield self._chat(chats[place], next(turns), document.id, with_ends=with_ends)
            else:
                yield self._plain(document.text, next(plain), with_ends=with_ends)

    def _plain(self, text: str, encoding: Encoding, *, with_ends: bool) -> Encoded:
        tokens = [self._bos_id, *encoding.ids, self._eos_id]
        ends = [0, *_ends_of_characters(encoding.offsets, len(text)), len(text)] if with_ends else []
        return Encoded(tokens, [True] * len(tokens), text, ends)

    def _chat(self, chat: Rendered, encoding: Encoding, where: str, *, with_ends: bool) -> Encoded:
        pieces = [_Piece(number, *place) for number, place in zip(encoding.ids, encoding.offsets, strict=True)]
        if chat.disguised != chat.text:
            pieces = self._pieces(chat.text, pieces)
        if not pieces or pieces[0].id != self._bos_id:
            pieces.insert(0, _Piece(self._bos_id, 0, 0))
        if self._bos_id in [piece.id for piece in pieces[1:]]:
            raise DataError(
                f"{where}: the chat template ({self.template.origin}) writes bos inside the conversation, where it "
                "would begin another document. Give a template that writes it only at the start (data.chat_template)."
            )
        bears = [False] * len(pieces)
        for start, end in chat.spans:
            self._mark(pieces, bears, chat.text, start, end)
        text, ends = self._covered(pieces, bears, chat.text)
        return Encoded([piece.id for piece in pieces], bears, text, ends if with_ends else [])

    def _pieces(self, text: str, disguised: Sequence[_Piece]) -> list[_Piece]:
        """Tokens of a conversation: the control tokens of its disguised text, and between them text as it is."""
        found: list[_Piece] = []
        place = 0
        for control in [*(piece for piece in disguised if piece.id in self.control_ids), None]:
            upto = len(text) if control is None else control.start
            if upto > place:
                encoding = self._text.encode(text[place:upto], add_special_tokens=False)
                found += [
                    _Piece(number, place + start, place + end)
                    for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
                ]
            if control is not None:
                found.append(control)
                place = control.end
        return found

    def _mark(self, pieces: Sequence[_Piece], bears: list[bool], text: str, start: int, end: int) -> None:
        """Mark the tokens of a turn. White space after the control token that ends it is the template's alone."""
        inside = [i for i, piece in enumerate(pieces) if start <= piece.start < piece.end <= end]
        controls = [i for i in inside if pieces[i].id in self.control_ids]
        if controls and not text[pieces[controls[-1]].end : end].strip():
            inside = [i for i in inside if i <= controls[-1]]
        for i in inside:
            bears[i] = True
        if inside and inside[-1] in controls:
            self.turn_ends.add(pieces[inside[-1]].id)

    def _covered(self, pieces: Sequence[_Piece], bears: Sequence[bool], text: str) -> tuple[str, list[int | None]]:
        """Text of the tokens that bear loss, and `Encoded.ends`."""
        parts: list[str] = []
        ends: list[int | None] = []
        length = upto = 0
        for i, piece in enumerate(pieces):
            if bears[i] and piece.id not in self.control_ids:
                part = text[max(piece.start, upto) : piece.end]
                parts.append(part)
                length += len(part)
                upto = max(upto, piece.end)
                cut = i + 1 < len(pieces) and pieces[i + 1].start < piece.end
                ends.append(None if cut else length)
            else:
                ends.append(length)
        return "".join(parts), ends


def _text_only(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of the same vocabulary that makes no control token of any text."""
    described = json.loads(tokenizer.to_str())
    for token in described["added_tokens"]:
        token["special"] = token["special"] or bool(token["content"].strip())
    same = Tokenizer.from_str(json.dumps(described))
    same.encode_special_tokens = True
    return same


def _ends_of_characters(offsets: Sequence[tuple[int, int]], length: int) -> list[int | None]:
    """End offset of each token's last character; None where the next token completes that character."""
    if not offsets:
        return []
    return [*(end if start >= end else None for (_, end), (start, _) in pairwise(offsets)), length]
