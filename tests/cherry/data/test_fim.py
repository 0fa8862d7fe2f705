"""Fill-in-the-middle: the form, the share, what stays the same, and a tokenizer without its tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from base.config import validate
from base.errors import ConfigError, DataError
from cherry.data.corpus import Document
from cherry.data.encode import Encoder
from cherry.data.fim import TRAINED_TOKENS, Fim, fim_of
from cherry.data.prepare import iterate_heldout, prepare
from cherry.data.shards import TokenDataset
from cherry.data.tokenizer import ROLE_TOKENS, train_tokenizer
from cherry.job_config import DataConfig

TEXTS = ["the quick brown fox jumps over the lazy dog", "def main(argv):\n    return 0\n", "naïve café 🙂 日本"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 600, bos_id=0, eos_id=1, more_special=TRAINED_TOKENS)


def fim_with(tokenizer: Tokenizer, rate: float = 1.0, seed: int = 0) -> Fim:
    fim = fim_of(tokenizer, DataConfig(fim_rate=rate, seed=seed))
    assert fim is not None
    return fim


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60), name=st.text(min_size=1, max_size=5))
def test_prefix_suffix_and_middle_spell_the_document(tokenizer: Tokenizer, text: str, name: str) -> None:
    fim = fim_with(tokenizer)
    (encoded,) = Encoder(tokenizer, bos_id=0, eos_id=1).encode_filled([Document(name, text)], fim)
    tokens = encoded.tokens
    assert tokens[:2] == [0, fim.begin]
    assert tokens[-1] == 1
    hole, end = tokens.index(fim.hole), tokens.index(fim.end)
    prefix, suffix, middle = tokens[2:hole], tokens[hole + 1 : end], tokens[end + 1 : -1]
    parts = [tokenizer.decode(part, skip_special_tokens=False) for part in (prefix, middle, suffix)]
    assert "".join(parts) == text
    assert tuple(parts) == fim.cut(Document(name, text))
    assert encoded.bears == [True] * len(tokens)


def test_the_share_and_the_cuts_come_from_the_seed_and_the_document_alone(tokenizer: Tokenizer) -> None:
    fim = fim_with(tokenizer, rate=0.1)
    documents = [Document(f"d{number}", "0123456789" * 10) for number in range(4000)]
    cuts = [fim.cut(document) for document in documents]
    filled = [cut for cut in cuts if cut is not None]
    assert 0.08 < len(filled) / len(cuts) < 0.12
    assert cuts[1000:1010] == [fim.cut(document) for document in documents[1000:1010]]
    assert cuts != [fim_with(tokenizer, rate=0.1, seed=1).cut(document) for document in documents]
    # Two uniform cuts leave a third of the text on average for each part.
    for part in range(3):
        assert 25 < sum(len(cut[part]) for cut in filled) / len(filled) < 42


def test_a_document_that_is_not_cut_is_encoded_as_ever(tokenizer: Tokenizer) -> None:
    documents = [Document(f"d{number}", TEXTS[number % 3]) for number in range(40)]
    plain = list(Encoder(tokenizer, bos_id=0, eos_id=1).encode_filled(documents, None))
    fim = fim_with(tokenizer, rate=0.5)
    some = list(Encoder(tokenizer, bos_id=0, eos_id=1).encode_filled(documents, fim))
    same = [one == other for one, other in zip(plain, some, strict=True)]
    assert same == [fim.cut(document) is None for document in documents]
    assert 5 < sum(same) < 35


def test_preparing_fills_in_training_documents_only(tmp_path: Path) -> None:
    source = tmp_path / "docs.jsonl"
    source.write_text("\n".join(json.dumps({"text": TEXTS[n % 3] * 2 + str(n)}) for n in range(200)))
    config = DataConfig(source=str(source), sequence_length=16, heldout_fraction=0.2, fim_rate=1.0)
    manifest = prepare(config, vocab_size=600, directory=str(tmp_path / "data"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    ids = [tokenizer.token_to_id(name) for name in TRAINED_TOKENS]
    assert ids == [2 + len(ROLE_TOKENS) + place for place in range(3)]
    dataset = TokenDataset(str(tmp_path / "data"))
    stream = [int(token) for index in range(len(dataset)) for token in dataset.sequence(index)[0][:-1]]
    begun = stream.count(0)
    assert begun > 100
    assert all(abs(stream.count(number) - begun) <= 1 for number in ids)
    held = list(iterate_heldout(str(tmp_path / "data"), None))
    assert len(held) == manifest.heldout["documents"]
    assert not any(set(ids) & set(document.tokens) for document in held)


def test_a_tokenizer_without_the_tokens_is_refused_and_deepseek_s_own_are_found(tokenizer: Tokenizer) -> None:
    bare = train_tokenizer(TEXTS, 600, bos_id=0, eos_id=1)
    with pytest.raises(DataError, match=r"t\.json: data\.fim_rate 0\.1 needs the tokens <｜fim▁begin｜>"):
        fim_of(bare, DataConfig(fim_rate=0.1, tokenizer="t.json"))
    assert fim_of(bare, DataConfig()) is None
    names = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    deepseek = train_tokenizer(TEXTS, 600, bos_id=0, eos_id=1, more_special=names)
    fim = fim_with(deepseek)
    assert [deepseek.id_to_token(number) for number in (fim.begin, fim.hole, fim.end)] == list(names)


def test_conversations_are_not_filled_in() -> None:
    with pytest.raises(ConfigError, match=r"fim_rate: must be 0 with data\.format chat"):
        validate({"fim_rate": 0.1, "format": "chat"}, DataConfig, origin="test")
