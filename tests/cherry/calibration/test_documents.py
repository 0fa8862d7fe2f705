import json
import shutil

import numpy as np
import pytest

from base.errors import DataError, MissingFileError
from cherry.calibration.documents import calibration_documents, documents_of, training_sequences
from cherry.data.shards import TokenDataset
from cherry.data.tokenizer import load_tokenizer
from cherry.job_config import DataConfig
from model.model_config import PRESETS, ModelConfig
from model.weights.hf_config import hf_config
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


@pytest.fixture
def weights(prepared, tmp_path):
    """Folder of a model, as far as a calibration set reads it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    config = ModelConfig(**{**PRESETS["tiny"], "vocab_size": 600, "max_position_embeddings": 64})
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    shutil.copy(prepared / "tokenizer.json", folder)
    return folder


def test_a_prepared_directory_and_a_file_are_told_apart(prepared, weights, tmp_path):
    found = calibration_documents(str(prepared), str(weights), 33)
    assert [len(tokens_T) for tokens_T in found] == [32, 32]
    assert len(calibration_documents(str(prepared), str(weights), None)) == min(128, len(TokenDataset(str(prepared))))
    (tmp_path / "a.txt").write_text("delta " * 200)
    [tokens_T] = calibration_documents(str(tmp_path / "a.txt"), str(weights), None)
    assert len(tokens_T) == 64, "of no more positions than the model has"


def test_data_of_another_tokenizer_is_refused(prepared, weights):
    (weights / "tokenizer.json").write_bytes((prepared / "tokenizer.json").read_bytes().replace(b'"alpha"', b'"Alpha"'))
    text = json.loads((weights / "tokenizer.json").read_text())
    text["model"]["vocab"] = {
        ("\u0120other" if name == "\u0120alpha" else name): n for name, n in text["model"]["vocab"].items()
    }
    text["model"]["merges"] = []
    (weights / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(DataError, match="prepared with another tokenizer than the one of"):
        calibration_documents(str(prepared), str(weights), None)
    (weights / "tokenizer.json").unlink()
    assert calibration_documents(str(prepared), str(weights), None), "nothing to compare with"
