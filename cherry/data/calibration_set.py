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
from cherry.data.shards import TokenDataset
from cherry.data.tokenizer import check_fit, load_tokenizer
from cherry.data.tokenizer_files import saved_template, tokenizer_uri
from cherry.job_config import DataConfig

_BATCH_DOCUMENTS = 64


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
