"""Data preparation: documents to token shards for training and held-out documents for evaluation; imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import InitVar, asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tokenizers import Tokenizer

from base import storage
from base.errors import ConfigError, DataError, storage_errors
from base.storage import Progress
from cherry.data.chat import Chat
from cherry.data.chat_template import FILE_NAME as TEMPLATE_NAME
from cherry.data.chat_template import ChatTemplate
from cherry.data.corpus import Document, Source, is_heldout, sample_texts
from cherry.data.encode import Encoded, Encoder
from cherry.data.fim import TRAINED_TOKENS, fim_of
from cherry.data.shards import SHARD_TOKENS, Manifest, ShardWriter, TokenDataset, read_manifest
from cherry.data.target_counts import write_target_counts
from cherry.data.tokenizer import check_fit, load_tokenizer, train_tokenizer
from cherry.data.tokenizer_files import chat_template, saved_template, tokenizer_uri
from cherry.job_config import DataConfig

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2_000_000
# Fraction of the total time, for the progress bar: measured on the standard library's sources, 2026-11-24.
_TOKENIZER_SHARE = 0.3


@dataclass(frozen=True)
class HeldoutDocument:
    """Held-out document: bos, then at most `max_tokens` tokens, the last of which ends at a character boundary.

    `loss_mask` marks the tokens to score: those of text, in a chat only the assistant's. `text` is what exactly these
    tokens decode to, and `bytes` its UTF-8 length: the model's and zlib's bits per byte cover the same bytes.
    """

    id: str
    tokens: list[int]
    loss_mask: list[bool]
    bytes: int
    text: str


def prepare(
    config: DataConfig,
    *,
    vocab_size: int,
    directory: str,
    bos_id: int = 0,
    eos_id: int = 1,
    weights: str | None = None,
    on_progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Prepare a directory: split documents, train or load the tokenizer, write token shards, commit; its manifest.

    The corpus is streamed once, and once before that if a tokenizer is trained.

    Args:
        weights: folder of the weights that training starts from, whose tokenizer is taken.

    Raises:
        ConfigError: `directory` is not local, but shards are memory-mapped.
        MissingFileError: the source or the tokenizer does not exist.
        DataError: a record is malformed, the tokenizer does not fit, or there is too little text.
        DiskFullError: no space is left.
    """
    if not storage.is_local(directory):
        raise ConfigError(f"{directory}: prepared data is memory-mapped, so its directory must be local.")
    report = on_progress or (lambda _line, _fraction: None)
    storage.remove_tree(directory)
    source = Source(config)
    path = Path(storage.local_path(directory))
    storage.make_directory(directory)
    report(f"{len(source.files):,} files, {source.bytes / 1e6:.1f} MB", 0.0)
    tokenizer, template = _tokenizer_and_template(
        source, path, tokenizer_uri(config, weights), vocab_size, bos_id=bos_id, eos_id=eos_id
    )
    tally, fim = _Tally(template), fim_of(tokenizer, config)
    told = "" if template is None else f", chat template: {template.origin}"
    report(f"tokenizer of {tokenizer.get_vocab_size():,} tokens{told}", _TOKENIZER_SHARE)
    encoder = Encoder(tokenizer, bos_id=bos_id, eos_id=eos_id, template=template)
    writer = ShardWriter(path, vocab_size, masked=config.format == "chat", shard_tokens=shard_tokens)
    with writer, storage_errors(directory), open(path / "heldout.jsonl", "w", encoding="utf-8") as heldout:
        _pack(source, lambda train: encoder.encode_filled(train, fim), tally, writer, heldout, report)
    if template is not None:
        _write_generation_settings(path, bos_id, eos_id, encoder.turn_ends)
    manifest = _manifest(config, source, tally, writer, tokenizer, (bos_id, eos_id), shard_tokens)
    write_target_counts(TokenDataset(directory, manifest), path)
    storage.write_json(str(path / "manifest.json"), asdict(manifest))
    storage.commit(directory, {"digest": manifest.digest, "config": config.model_dump(mode="json")})
    report(_summary(manifest, source) + told, 1.0)
    return manifest


def _tokenizer_and_template(
    source: Source, path: Path, uri: str | None, vocab_size: int, *, bos_id: int, eos_id: int
) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer and, for chats, the template; both are written to `path`."""
    config = source.config
    tokenizer = _tokenizer(source, uri, vocab_size, bos_id, eos_id)
    storage.write_bytes(str(path / "tokenizer.json"), tokenizer.to_str(pretty=True).encode())
    if config.format != "chat":
        return tokenizer, None
    template = chat_template(config, tokenizer, uri, bos_id=bos_id, eos_id=eos_id)
    storage.write_bytes(str(path / TEMPLATE_NAME), template.source.encode())
    return tokenizer, template


def _pack(
    source: Source,
    encode: Callable[[list[Document]], Iterator[Encoded]],
    tally: _Tally,
    writer: ShardWriter,
    heldout: TextIO,
    report: Progress,
) -> None:
    """Write the documents of the source: those for training as tokens, the others to `heldout`."""
    for batch in _batches(source.documents()):
        train = [document for document in batch if not tally.add(document, source.config, heldout)]
        for encoded in encode(train):
            writer.add(encoded.tokens, encoded.bears)
        done = _TOKENIZER_SHARE + (0.98 - _TOKENIZER_SHARE) * min(1.0, tally.bytes / max(source.bytes, 1))
        report(f"packed {tally.documents:,} documents, {writer.tokens:,} tokens", done)
    heldout.flush()
    os.fsync(heldout.fileno())


def _write_generation_settings(path: Path, bos_id: int, eos_id: int, turn_ends: set[int]) -> None:
    """Settings by which a model stops at eos and at the tokens that ended the assistant's turns."""
    ends = [eos_id, *sorted(turn_ends - {eos_id})]
    settings = {"bos_token_id": bos_id, "eos_token_id": ends, "do_sample": False}
    storage.write_json(str(path / "generation_config.json"), settings)


def _summary(manifest: Manifest, source: Source) -> str:
    left_out = f", {manifest.skipped_files} files that are not UTF-8 left out" if manifest.skipped_files else ""
    if source.left_out:
        names = ", ".join(file.name for file in source.left_out[:3]) + (", ..." if len(source.left_out) > 3 else "")
        left_out += f", {names} left out (about the data, not of it)"
    return f"{manifest.sequences:,} sequences of {manifest.sequence_length} tokens{left_out}"


def _tokenizer(source: Source, uri: str | None, vocab_size: int, bos_id: int, eos_id: int) -> Tokenizer:
    config = source.config
    if uri is not None:
        tokenizer = load_tokenizer(uri)
        check_fit(tokenizer, uri, vocab_size=vocab_size, bos_id=bos_id, eos_id=eos_id)
        return tokenizer
    train = (document for document in source.documents() if not _is_held_out(document, config))
    texts = sample_texts(train, size_bytes=config.tokenizer_sample_bytes, seed=config.seed)
    fim_tokens = TRAINED_TOKENS if config.fim_rate else ()
    return train_tokenizer(texts, vocab_size, bos_id=bos_id, eos_id=eos_id, more_special=fim_tokens)


def _is_held_out(document: Document, config: DataConfig) -> bool:
    return is_heldout(document.id, seed=config.seed, fraction=config.heldout_fraction)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class _Tally:
    """Running totals over the documents, and the digest of them and of the template that writes chats."""

    template: InitVar[ChatTemplate | None]
    documents: int = 0
    bytes: int = 0
    heldout: int = 0
    heldout_bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    zlib: _Zlib = field(default_factory=lambda: _Zlib())

    def __post_init__(self, template: ChatTemplate | None) -> None:
        if template is not None:
            self.digest.update(template.source.encode())

    def add(self, document: Document, config: DataConfig, heldout: TextIO) -> bool:
        """True if the document is held out: it is then written to `heldout`. Counts it either way."""
        text = document.text.encode()
        content = (
            text if document.chat is None else json.dumps([document.chat.messages, document.chat.context]).encode()
        )
        self.digest.update(f"{document.id}\0{len(content)}\0".encode() + content)
        self.documents += 1
        self.bytes += len(text)
        held = _is_held_out(document, config)
        if held:
            self.heldout += 1
            self.heldout_bytes += len(text)
            self.zlib.add(text)
            record: dict[str, Any] = {"id": document.id, "text": document.text, "bytes": len(text)}
            if document.chat is not None:
                record |= {"messages": document.chat.messages, "context": document.chat.context}
            heldout.write(json.dumps(record, ensure_ascii=False) + "\n")
        return held


def _manifest(
    config: DataConfig,
    source: Source,
    tally: _Tally,
    writer: ShardWriter,
    tokenizer: Tokenizer,
    bos_and_eos: tuple[int, int],
    shard_tokens: int,
) -> Manifest:
    where = f"data.source {config.source}"
    if not tally.documents:
        raise DataError(
            f"{where}: no document with text in {len(source.files)} files, {source.skipped} of which are not UTF-8. "
            "Check data.source and data.format."
        )
    if tally.heldout < 2 or tally.heldout == tally.documents:
        raise DataError(
            f"{where}: {tally.documents} documents give {tally.documents - tally.heldout} for training and "
            f"{tally.heldout} held out at data.heldout_fraction {config.heldout_fraction}; training needs at least 1, "
            "and a comparison 2. Give more documents, or another fraction or data.seed."
        )
    sequences = (writer.tokens - 1) // config.sequence_length
    if sequences < 1:
        raise DataError(
            f"{where}: {writer.tokens} training tokens do not fill one sequence of {config.sequence_length} + 1. "
            "Give more text or a shorter data.sequence_length."
        )
    return Manifest(
        source=config.source,
        digest=tally.digest.hexdigest(),
        documents=tally.documents,
        bytes=tally.bytes,
        tokens=writer.tokens,
        sequences=sequences,
        sequence_length=config.sequence_length,
        vocab_size=tokenizer.get_vocab_size(),
        bos_id=bos_and_eos[0],
        eos_id=bos_and_eos[1],
        token_type=writer.dtype.name,
        shards=writer.names,
        shard_tokens=shard_tokens,
        masked=writer.masked,
        heldout={
            "documents": tally.heldout,
            "bytes": tally.heldout_bytes,
            "zlib_bits_per_byte": tally.zlib.bits_per_byte(),
        },
        files=len(source.files),
        skipped_files=source.skipped,
    )


def iterate_heldout(directory: str, max_tokens: int | None) -> Iterator[HeldoutDocument]:
    """Held-out documents in order, each cut to at most `max_tokens` tokens after bos.

    Raises:
        MissingFileError: the directory is not committed.
    """
    manifest = read_manifest(directory)
    tokenizer = load_tokenizer(storage.join(directory, "tokenizer.json"))
    ids = {"bos_id": manifest.bos_id, "eos_id": manifest.eos_id}
    template = saved_template(storage.join(directory, TEMPLATE_NAME), tokenizer, **ids)
    encoder = Encoder(tokenizer, template=template, **ids)
    for batch in _batches(_read_heldout(storage.join(directory, "heldout.jsonl"))):
        for document, tokens in zip(batch, encoder.encode(batch, with_ends=True), strict=True):
            yield _cut(document.id, tokens, max_tokens, encoder.control_ids)


def _read_heldout(uri: str) -> Iterator[Document]:
    with storage.open_read(uri) as handle:
        for line in handle:
            record = json.loads(line)
            chat = Chat(tuple(record["messages"]), record.get("context", {})) if "messages" in record else None
            yield Document(record["id"], record["text"], chat)


def _cut(name: str, encoded: Encoded, max_tokens: int | None, control_ids: set[int]) -> HeldoutDocument:
    """Held-out document of an encoded one: without the last eos, cut to `max_tokens` at a character boundary."""
    length = len(encoded.tokens) - (encoded.tokens[-1] in control_ids)
    if max_tokens is not None:
        length = min(length, max_tokens + 1)
    while (end := encoded.ends[length - 1]) is None:
        length -= 1
    tokens, text = encoded.tokens[:length], encoded.text[:end]
    scored = [bears and token not in control_ids for token, bears in zip(tokens, encoded.bears, strict=False)]
    scored[0] = False
    return HeldoutDocument(name, tokens, scored, len(text.encode()), text)


class _Zlib:
    """Compressed size of one growing zlib stream."""

    def __init__(self) -> None:
        self._stream = zlib.compressobj(9)
        self._read = self._written = 0

    def add(self, data: bytes) -> None:
        self._read += len(data)
        self._written += len(self._stream.compress(data))

    def bits_per_byte(self) -> float:
        """Compressed bits per byte read; ends the stream."""
        return 8 * (self._written + len(self._stream.flush())) / max(1, self._read)


def zlib_bits_per_byte(texts: Iterable[str]) -> float:
    """Compressed size of the texts, joined into one zlib stream at level 9, in bits per UTF-8 byte.

    In one stream zlib can refer back to earlier documents: a stronger baseline than one stream per document.
    """
    stream = _Zlib()
    for text in texts:
        stream.add(text.encode())
    return stream.bits_per_byte()
