"""Documents that a quantization is calibrated with: a run's own training data, or a file of texts or records.

Shapes: T position, T <= sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from base import storage
from base.errors import DataError
from cherry.data.chat_template import FILE_NAME as TEMPLATE_NAME
from cherry.data.corpus import Document, Source
from cherry.data.encode import Encoder
from cherry.data.shards import TokenDataset, read_manifest
from cherry.data.tokenizer import check_fit, load_tokenizer
from cherry.data.tokenizer_files import saved_template, tokenizer_uri
from cherry.job_config import DataConfig
from model.calibration.names import DEFAULT_SEQUENCES
from model.weights.pretrained import read_model_config

FILE_SEQUENCE_LENGTH = 2048
"""Tokens at most of a file's document: as in GPTQ's paper (arXiv 2210.17323, section 5)."""
_BATCH_DOCUMENTS = 64
_MANIFEST, _TOKENIZER = "manifest.json", "tokenizer.json"


def calibration_documents(data: str, weights: str, tokens: int | None) -> list[NDArray[np.int64]]:
    """Tokens [T] of each calibration document, at least so many in all, or all there are.

    Args:
        data: a prepared directory, or documents as `data.source` takes them.
        weights: folder of the model that is quantized.
        tokens: `None` is 128 sequences, of the prepared length or of `FILE_SEQUENCE_LENGTH`.

    Raises:
        MissingFileError, WeightsError, ConfigError: data or weights cannot be read.
        DataError: there is no text, or the data is of another tokenizer than the model.
    """
    config, _ = read_model_config(weights)
    if storage.exists(storage.join(data, _MANIFEST)):
        _check_tokenizer(data, weights)
        length = read_manifest(data).sequence_length
        return training_sequences(data, tokens or DEFAULT_SEQUENCES * length)
    length = min(FILE_SEQUENCE_LENGTH, config.max_position_embeddings)
    return documents_of(
        DataConfig(source=data, sequence_length=length),
        weights,
        tokens=tokens or DEFAULT_SEQUENCES * length,
        vocab_size=config.vocab_size,
        bos_id=config.bos_token_id,
        eos_id=config.eos_token_id,
    )


def _check_tokenizer(data: str, weights: str) -> None:
    """Refuse data that was prepared with another tokenizer than the one beside the weights, where there is one.

    Raises:
        DataError: their vocabularies differ.
    """
    uris = [storage.join(folder, _TOKENIZER) for folder in (data, weights)]
    if all(storage.exists(uri) for uri in uris):
        prepared, own = (load_tokenizer(uri).get_vocab() for uri in uris)
        if prepared != own:
            raise DataError(
                f"{data}: was prepared with another tokenizer than the one of {weights}, so its tokens mean something "
                "else there. Calibrate with the data of the run that the weights are of, or with a file of text."
            )


def training_sequences(data_directory: str, tokens: int) -> list[NDArray[np.int64]]:
    """At least so many tokens, or all there are: sequences [T] at even distances in the shards of a prepared directory.

    Raises:
        MissingFileError, DataError: see `TokenDataset`.
    """
    dataset = TokenDataset(data_directory)
    length = dataset.manifest.sequence_length
    count = min(len(dataset), -(-tokens // length))
    return [dataset.sequence(place * len(dataset) // count)[0][:length] for place in range(count)]


def documents_of(
    config: DataConfig, weights: str, *, tokens: int, vocab_size: int, bos_id: int, eos_id: int
) -> list[NDArray[np.int64]]:
    """At least so many tokens [T] a document, or all there are, from the beginning of `config.source`.

    A document is bos and its first `sequence_length` - 1 tokens, in the tokenizer of the weights (or data.tokenizer).

    Args:
        weights: folder of the model that is quantized.

    Raises:
        MissingFileError: there is no file at the source.
        DataError: the tokenizer is missing or does not fit the model, a record is malformed, or there is no text.
    """
    uri = tokenizer_uri(config, weights)
    assert uri is not None, "weights were given, so there is a tokenizer or an error"
    tokenizer = load_tokenizer(uri)
    ids = {"bos_id": bos_id, "eos_id": eos_id}
    check_fit(tokenizer, uri, vocab_size=vocab_size, **ids)
    template = saved_template(storage.join(weights, TEMPLATE_NAME), tokenizer, **ids)
    encoder = Encoder(tokenizer, template=template, **ids)
    found: list[NDArray[np.int64]] = []
    total = 0
    for encoded in chain.from_iterable(map(encoder.encode, _batches(Source(config).documents()))):
        found.append(np.asarray(encoded.tokens[: config.sequence_length], dtype=np.int64))
        total += len(found[-1])
        if total >= tokens:
            break
    if not found:
        raise DataError(f"{config.source}: no document with text to calibrate with. Give a file, a folder or a glob.")
    return found


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(islice(documents, _BATCH_DOCUMENTS)):
        yield batch
