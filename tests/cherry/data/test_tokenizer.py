"""Tokenizers: training, files, and tokenizers that do not fit the model."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from base import storage
from base.errors import DataError, MissingFileError
from cherry.data.corpus import Document
from cherry.data.encode import Encoder
from cherry.data.tokenizer import check_fit, load_tokenizer, train_tokenizer

BOS_ID, EOS_ID = 0, 1


TEXTS = ["the quick brown fox jumps over the lazy dog", "def main(argv):\n    return 0\n", "naïve café 🙂 日本"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 600, bos_id=BOS_ID, eos_id=EOS_ID)


def test_training_the_same_texts_gives_the_same_tokenizer_of_the_size_asked() -> None:
    first, second = (train_tokenizer(TEXTS, 300, bos_id=0, eos_id=1).to_str() for _ in range(2))
    assert first == second
    assert Tokenizer.from_str(first).get_vocab_size() == 300


def test_a_trained_tokenizer_has_its_ends_where_the_model_looks() -> None:
    with pytest.raises(DataError, match=r"bos 0 and eos 1, the model has 5 and 1\. Give data\.tokenizer"):
        train_tokenizer(TEXTS, 600, bos_id=5, eos_id=1)


def test_a_tokenizer_that_does_not_belong_to_the_model_is_refused(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    check_fit(tokenizer, "t.json", vocab_size=size, bos_id=0, eos_id=1)
    with pytest.raises(DataError, match=rf"t\.json: has tokens up to id {size - 1}, model\.vocab_size is {size - 1}"):
        check_fit(tokenizer, "t.json", vocab_size=size - 1, bos_id=0, eos_id=1)
    with pytest.raises(DataError, match=r"model\.eos_token_id must be one of its added tokens, got 40, which is 'D'"):
        check_fit(tokenizer, "t.json", vocab_size=size, bos_id=0, eos_id=40)
    with pytest.raises(DataError, match=r"model\.bos_token_id .* got 100000, which is None"):
        check_fit(tokenizer, "t.json", vocab_size=size, bos_id=100_000, eos_id=1)


def test_a_tokenizer_that_would_cut_or_pad_encodes_whole_documents(tokenizer: Tokenizer) -> None:
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(4)
    cutting.enable_padding(length=50)
    storage.write_bytes("memory://tokenizers/cutting.json", cutting.to_str().encode())
    loaded = load_tokenizer("memory://tokenizers/cutting.json")
    expected, found = (
        list(Encoder(each, bos_id=BOS_ID, eos_id=EOS_ID).encode([Document("d", TEXTS[0])], with_ends=True))
        for each in (tokenizer, loaded)
    )
    assert found == expected


def test_a_file_that_is_no_tokenizer_is_named() -> None:
    with pytest.raises(MissingFileError):
        load_tokenizer("memory://tokenizers/none.json")
    for content in (b"{}", b"\xff\x00", b"[1"):
        storage.write_bytes("memory://tokenizers/wrong.json", content)
        with pytest.raises(DataError, match=r"memory://tokenizers/wrong\.json: not a tokenizer\.json"):
            load_tokenizer("memory://tokenizers/wrong.json")
