"""Owns how documents become fixed token sequences on disk, and the order in which training reads them.

It knows nothing of models or torch: sequences are numpy arrays, and an order is a function of a seed and a step.

Shapes: T sequence length.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from base import storage
from base.errors import DataError, storage_errors
from cherry.config import DataConfig
from cherry.documents import Document, is_heldout, read_documents
from cherry.tokenizer import ROLE_TOKENS, load_tokenizer, train_tokenizer

IGNORE_INDEX = -100
_ENCODE_BATCH = 256
_SHARD_TOKENS = 1 << 28

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Manifest:
    """What `prepare` wrote; manifest.json holds the same."""

    source: str
    digest: str
    """SHA-256 over every document's id and text, in order."""
    documents: int
    bytes: int
    tokens: int
    sequences: int
    sequence_length: int
    vocab_size: int
    bos_id: int
    eos_id: int
    token_type: str
    shards: list[str]
    shard_tokens: int
    masked: bool
    """Whether a mask file stands beside each shard (chat: only the assistant's tokens bear loss)."""
    heldout: dict[str, float]
    """documents, bytes, and zlib_bits_per_byte of the whole held-out documents."""


@dataclass(frozen=True)
class HeldoutDocument:
    """One held-out document: bos, then at most max_tokens tokens; `bytes` is the text that these tokens cover."""

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
    on_progress: Progress | None = None,
) -> Manifest:
    """Read the documents, split them, make or load the tokenizer, pack tokens into shards, and commit.

    Raises:
        MissingFileError: no such source or tokenizer.
        DataError: a broken record, a tokenizer that does not fit, or too little text for one sequence.
    """
    report = on_progress or (lambda _line, _fraction: None)
    storage.remove_tree(directory)
    path = Path(storage.local_path(directory))
    path.mkdir(parents=True)
    documents = _choose(config)
    train, heldout, digest, size = _split(documents, config)
    report(f"{len(documents):,} documents, {size / 1e6:.1f} MB, {len(heldout)} held out", 0.1)
    tokenizer = _tokenizer(config, train, vocab_size, bos_id, eos_id)
    tokenizer.save(str(path / "tokenizer.json"))
    report(f"tokenizer of {tokenizer.get_vocab_size():,} tokens", 0.3)
    writer = _ShardWriter(path, vocab_size, masked=any(d.messages is not None for d in train))
    for done in range(0, len(train), _ENCODE_BATCH):
        for ids, mask in encode(tokenizer, train[done : done + _ENCODE_BATCH], bos_id, eos_id):
            writer.add(ids, mask)
        report(f"packed {writer.tokens:,} tokens", 0.3 + 0.6 * min(1.0, (done + _ENCODE_BATCH) / len(train)))
    sequences = (writer.tokens - 1) // config.sequence_length
    if sequences < 1:
        raise DataError(
            f"data.source {config.source}: {writer.tokens} training tokens do not fill one sequence of "
            f"{config.sequence_length} + 1. Give more text or a shorter data.sequence_length."
        )
    _write_heldout(path / "heldout.jsonl", heldout)
    manifest = Manifest(
        source=config.source,
        digest=digest,
        documents=len(documents),
        bytes=size,
        tokens=writer.tokens,
        sequences=sequences,
        sequence_length=config.sequence_length,
        vocab_size=tokenizer.get_vocab_size(),
        bos_id=bos_id,
        eos_id=eos_id,
        token_type=writer.dtype.name,
        shards=writer.names,
        shard_tokens=_SHARD_TOKENS,
        masked=writer.masked,
        heldout={
            "documents": len(heldout),
            "bytes": sum(len(d.text.encode()) for d in heldout),
            "zlib_bits_per_byte": zlib_bits_per_byte(d.text for d in heldout),
        },
    )
    storage.write_json(str(path / "manifest.json"), asdict(manifest))
    storage.commit(directory, {"digest": digest})
    report(f"{sequences:,} sequences of {config.sequence_length} tokens", 1.0)
    return manifest


def _write_heldout(path: Path, heldout: list[Document]) -> None:
    with storage_errors(str(path)), path.open("w", encoding="utf-8") as handle:
        for document in heldout:
            record: dict[str, Any] = {"id": document.id, "text": document.text, "bytes": len(document.text.encode())}
            if document.messages is not None:
                record["messages"] = [{"role": role, "content": content} for role, content in document.messages]
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")


def _choose(config: DataConfig) -> list[Document]:
    documents = list(read_documents(config))
    if config.max_documents is not None and len(documents) > config.max_documents:
        keep = np.random.default_rng(config.seed).permutation(len(documents))[: config.max_documents]
        documents = [documents[i] for i in sorted(keep)]
    if not documents:
        raise DataError(f"data.source {config.source}: every file is empty; there is no document to train on")
    return documents


def _split(documents: list[Document], config: DataConfig) -> tuple[list[Document], list[Document], str, int]:
    hasher, size = hashlib.sha256(), 0
    train: list[Document] = []
    heldout: list[Document] = []
    for document in documents:
        content = document.text.encode()
        hasher.update(f"{document.id}\0{len(content)}\0".encode() + content)
        size += len(content)
        kept = is_heldout(document.id, seed=config.seed, fraction=config.heldout_fraction)
        (heldout if kept else train).append(document)
    if not train or not heldout:
        raise DataError(
            f"data.source {config.source}: {len(documents)} documents give {len(train)} for training and "
            f"{len(heldout)} held out at data.heldout_fraction {config.heldout_fraction}; both need at least one. "
            "Give more documents, or another fraction or data.seed."
        )
    return train, heldout, hasher.hexdigest(), size


def _tokenizer(config: DataConfig, train: list[Document], vocab_size: int, bos_id: int, eos_id: int) -> Tokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, vocab_size)

    def sample() -> Iterator[str]:
        left = config.tokenizer_sample_bytes
        for i in np.random.default_rng(config.seed).permutation(len(train)):
            if left <= 0:
                return
            yield train[i].text
            left -= len(train[i].text.encode())

    return train_tokenizer(sample(), vocab_size, bos_id=bos_id, eos_id=eos_id)


def encode(
    tokenizer: Tokenizer, documents: list[Document], bos_id: int, eos_id: int
) -> Iterator[tuple[list[int], list[bool] | None]]:
    """Token ids of each document, bos first and eos last, and for chat which of them bear loss.

    A chat is `bos (role content eos)*`, where role is that role's token (its name and a line break where a given
    tokenizer has none); the assistant's content and its eos bear loss.
    """
    plain = [document for document in documents if document.messages is None]
    encodings = iter(tokenizer.encode_batch([document.text for document in plain], add_special_tokens=False))
    for document in documents:
        if document.messages is None:
            yield [bos_id, *next(encodings).ids, eos_id], None
            continue
        ids, mask = [bos_id], [False]
        for role, content in document.messages:
            token = tokenizer.token_to_id(ROLE_TOKENS[role])
            start = [token] if token is not None else tokenizer.encode(f"{role}\n", add_special_tokens=False).ids
            body = [*tokenizer.encode(content, add_special_tokens=False).ids, eos_id]
            ids += [*start, *body]
            mask += [False] * len(start) + [role == "assistant"] * len(body)
        yield ids, mask


class _ShardWriter:
    """Appends tokens to train-00000.bin and so on, each of _SHARD_TOKENS but the last."""

    def __init__(self, directory: Path, vocab_size: int, *, masked: bool) -> None:
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.masked = masked
        self.tokens = 0
        self.names: list[str] = []
        self._directory = directory

    def add(self, ids: list[int], mask: list[bool] | None) -> None:
        tokens = np.asarray(ids, dtype=self.dtype)
        bears = np.ones(len(ids), dtype=np.uint8) if mask is None else np.asarray(mask, dtype=np.uint8)
        done = 0
        while done < len(tokens):
            room = _SHARD_TOKENS - self.tokens % _SHARD_TOKENS
            part = slice(done, done + room)
            self._append(tokens[part], bears[part])
            done += len(tokens[part])

    def _append(self, tokens: NDArray[Any], bears: NDArray[np.uint8]) -> None:
        name = f"train-{self.tokens // _SHARD_TOKENS:05d}.bin"
        if name not in self.names:
            self.names.append(name)
        for suffix, values in ((".bin", tokens), (".mask", bears)):
            if suffix == ".bin" or self.masked:
                path = self._directory / name.replace(".bin", suffix)
                with storage_errors(str(path)), path.open("ab") as handle:
                    values.tofile(handle)
        self.tokens += len(tokens)


class TokenDataset:
    """The packed sequences of a prepared directory, memory-mapped.

    Raises:
        MissingFileError: the directory was never committed.
        DataError: a shard is shorter than the manifest says.
    """

    def __init__(self, directory: str) -> None:
        storage.read_commit(directory)
        self.manifest = Manifest(**storage.read_json(storage.join(directory, "manifest.json")))
        root = Path(storage.local_path(directory))
        self._shards = [
            np.memmap(root / name, dtype=self.manifest.token_type, mode="r") for name in self.manifest.shards
        ]
        found = sum(len(shard) for shard in self._shards)
        if found != self.manifest.tokens:
            raise DataError(f"{directory}: shards hold {found} tokens, manifest.json says {self.manifest.tokens}")
        names = [name.replace(".bin", ".mask") for name in self.manifest.shards] if self.manifest.masked else []
        self._masks = [np.memmap(root / name, dtype=np.uint8, mode="r") for name in names]

    def __len__(self) -> int:
        return self.manifest.sequences

    def sequence(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens [T+1] and which of them bear loss [T+1]; neighbours share one token."""
        start = index * self.manifest.sequence_length
        end = start + self.manifest.sequence_length + 1
        tokens = self._read(self._shards, start, end).astype(np.int64)
        if not self._masks:
            return tokens, np.ones(len(tokens), dtype=np.bool_)
        return tokens, self._read(self._masks, start, end).astype(np.bool_)

    def _read(self, shards: list[Any], start: int, end: int) -> NDArray[Any]:
        size = self.manifest.shard_tokens
        first, last = start // size, (end - 1) // size
        if first == last:
            return np.asarray(shards[first][start - first * size : end - first * size])
        return np.concatenate([shards[first][start - first * size :], shards[last][: end - last * size]])


@dataclass(frozen=True)
class Sampler:
    """Which sequences each optimizer step reads: a seeded permutation an epoch, one long row of them.

    The order is a function of the seed and the position alone, so it is the same for any number of ranks, and
    resuming needs nothing but the step. A batch may span two epochs; no sequence is left out.
    """

    length: int
    seed: int
    batch_size: int

    def indices(self, step: int, data_rank: int = 0, data_ranks: int = 1) -> NDArray[np.int64]:
        """Sequence ids of this rank in optimizer step `step` (0-based): every `data_ranks`-th of the batch."""
        first = step * self.batch_size
        positions = np.arange(first + data_rank, first + self.batch_size, data_ranks)
        chosen = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(positions // self.length):
            here = positions // self.length == epoch
            order = np.random.default_rng([self.seed, int(epoch)]).permutation(self.length)
            chosen[here] = order[positions[here] % self.length]
        return chosen


def load_heldout(directory: str, max_documents: int | None, max_tokens: int | None) -> list[HeldoutDocument]:
    """The held-out documents, encoded, each cut to `max_tokens` tokens after bos; see `HeldoutDocument`."""
    storage.read_commit(directory)
    manifest = Manifest(**storage.read_json(storage.join(directory, "manifest.json")))
    tokenizer = load_tokenizer(storage.join(directory, "tokenizer.json"))
    lines = storage.read_bytes(storage.join(directory, "heldout.jsonl")).decode().split("\n")
    documents: list[Document] = []
    for line in [line for line in lines if line][:max_documents]:
        record = json.loads(line)
        messages = tuple((m["role"], m["content"]) for m in record["messages"]) if "messages" in record else None
        documents.append(Document(record["id"], record["text"], messages))
    result = []
    for document, (ids, mask) in zip(
        documents, encode(tokenizer, documents, manifest.bos_id, manifest.eos_id), strict=True
    ):
        ids, mask = ids[:-1], mask[:-1] if mask is not None else None  # the eos covers no text
        if max_tokens is not None:
            ids, mask = ids[: max_tokens + 1], mask[: max_tokens + 1] if mask is not None else None
        scored = [False] + ([True] * (len(ids) - 1) if mask is None else mask[1:])
        text = _covered(tokenizer, document, ids, scored)
        result.append(HeldoutDocument(document.id, ids, scored, len(text.encode()), text))
    return result


def _covered(tokenizer: Tokenizer, document: Document, ids: list[int], scored: list[bool]) -> str:
    """The text that the scored tokens spell."""
    if document.messages is None:
        encoding = tokenizer.encode(document.text, add_special_tokens=False)
        return document.text[: encoding.offsets[len(ids) - 2][1]] if len(ids) > 1 else ""
    kept = [token for token, bears in zip(ids, scored, strict=True) if bears]
    return str(tokenizer.decode(kept, skip_special_tokens=True))


def zlib_bits_per_byte(texts: Iterable[str]) -> float:
    """What zlib at level 9 needs for the texts joined into one stream, in bits per byte of UTF-8.

    Joined, it may reuse what it saw in earlier documents: a harder reference than one stream a document.
    """
    data = "".join(texts).encode()
    return 8 * len(zlib.compress(data, 9)) / max(1, len(data))
