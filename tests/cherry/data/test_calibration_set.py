import json

import numpy as np
import pytest

from base.errors import DataError, MissingFileError
from cherry.data.calibration_set import documents_of, training_sequences
from cherry.data.shards import TokenDataset
from cherry.data.tokenizer import load_tokenizer
from cherry.job_config import DataConfig
from tests.training_job import prepare_documents


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_documents(tmp_path_factory.mktemp("documents"))


def of(source, prepared, *, tokens, **changes):
    config = DataConfig(source=str(source), sequence_length=20, **changes)
    return documents_of(config, str(prepared), tokens=tokens, vocab_size=600, bos_id=0, eos_id=1)


def test_sequences_come_from_all_over_the_shards_and_never_twice(prepared):
    dataset = TokenDataset(str(prepared))
    found = training_sequences(str(prepared), 5 * 32 - 3)
    assert [len(tokens_T) for tokens_T in found] == [32] * 5
    places = [place * len(dataset) // 5 for place in range(5)]
    assert places[-1] > len(dataset) // 2
    for place, tokens_T in zip(places, found, strict=True):
        assert np.array_equal(tokens_T, dataset.sequence(place)[0][:32])
    everything = training_sequences(str(prepared), 10**9)
    assert len(everything) == len(dataset)


def test_a_file_s_documents_are_encoded_by_the_weights_tokenizer_and_cut(prepared, tmp_path):
    texts = ["alpha beta gamma", "delta " * 40, "theta"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "set.jsonl").write_text(lines)
    found = of(tmp_path / "set.jsonl", prepared, tokens=10**6)
    tokenizer = load_tokenizer(str(prepared / "tokenizer.json"))
    for text, tokens_T in zip(texts, found, strict=True):
        whole = [0, *tokenizer.encode(text, add_special_tokens=False).ids, 1]
        assert tokens_T.tolist() == whole[:20]
    assert len(found[1]) == 20


def test_no_more_documents_are_taken_than_the_tokens_ask_for(prepared, tmp_path):
    (tmp_path / "a.txt").write_text("delta " * 40)
    (tmp_path / "b.txt").write_text("gamma " * 40)
    (tmp_path / "c.txt").write_text("alpha " * 40)
    assert len(of(tmp_path, prepared, tokens=20)) == 1
    assert len(of(tmp_path, prepared, tokens=21)) == 2
    assert len(of(tmp_path, prepared, tokens=1000)) == 3


def test_what_cannot_be_used_is_refused(prepared, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match="no document with text"):
        of(tmp_path / "blank.txt", prepared, tokens=10)
    with pytest.raises(MissingFileError):
        of(tmp_path / "nowhere", prepared, tokens=10)
    with pytest.raises(DataError, match="no tokenizer"):
        of(tmp_path / "blank.txt", tmp_path, tokens=10)
