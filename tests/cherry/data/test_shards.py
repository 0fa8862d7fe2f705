"""Token shards on disk: what is read back from them, loss masks, and damage that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from base.errors import DataError, MissingFileError
from cherry.data.shards import TokenDataset
from tests.cherry.data.preparing import make, stream


@pytest.mark.parametrize("masked", [False, True])
def test_several_shards_read_as_one(corpus: Path, chats: Path, tmp_path: Path, masked: bool) -> None:
    source = chats if masked else corpus
    options: dict[str, Any] = {"format": "chat" if masked else "text", "max_documents": 12}
    whole = make(source, tmp_path / "whole", **options)
    # Shards of less than one sequence: a sequence may lie in several.
    for shard_tokens in (5, 17, 64, whole.tokens, whole.tokens - 1):
        manifest = make(source, tmp_path / "parts", shard_tokens=shard_tokens, **options)
        assert len(manifest.shards) == -(-whole.tokens // shard_tokens)
        single, several = TokenDataset(str(tmp_path / "whole")), TokenDataset(str(tmp_path / "parts"))
        assert len(single) == len(several) == (whole.tokens - 1) // 16
        for index in range(len(single)):
            for ours, theirs in zip(single.sequence(index), several.sequence(index), strict=True):
                assert ours.tolist() == theirs.tolist()
                assert len(ours) == 17


def test_a_large_vocabulary_takes_four_bytes_a_token(corpus: Path, tmp_path: Path) -> None:
    make(corpus, tmp_path / "small")
    tokenizer = json.loads((tmp_path / "small" / "tokenizer.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(tokenizer))
    manifest = make(corpus, tmp_path / "large", vocab=100_000, tokenizer=str(tmp_path / "t.json"))
    assert manifest.token_type == "uint32"
    assert stream(tmp_path / "small") == stream(tmp_path / "large")


def test_only_the_assistant_s_tokens_bear_loss_in_the_sequences(chats: Path, tmp_path: Path) -> None:
    manifest = make(chats, tmp_path / "data", format="chat")
    assert manifest.masked
    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    dataset = TokenDataset(str(tmp_path / "data"))
    rows = [dataset.sequence(i) for i in range(len(dataset))]
    bearing = [int(t) for tokens, bears in rows for t, b in zip(tokens[:-1], bears[:-1], strict=True) if b]
    text = tokenizer.decode(bearing, skip_special_tokens=False)
    answers = text.split("<|end_of_text|>")[:-1]
    assert len(answers) > 80
    assert all(answer.startswith("the number is") for answer in answers)
    assert "what is" not in text
    assert "<|user|>" not in text


def test_plain_text_bears_loss_everywhere(corpus: Path, tmp_path: Path) -> None:
    assert not make(corpus, tmp_path / "data").masked
    _, bears = TokenDataset(str(tmp_path / "data")).sequence(0)
    assert bears.all()


@pytest.mark.parametrize("change", ["shorter", "longer", "odd", "empty", "gone", "mask"])
def test_a_damaged_shard_is_refused(chats: Path, tmp_path: Path, change: str) -> None:
    make(chats, tmp_path / "data", format="chat", shard_tokens=300)
    shard = tmp_path / "data" / ("train-00001.mask" if change == "mask" else "train-00001.bin")
    content = shard.read_bytes()
    damaged = {"shorter": content[:-2], "longer": content + b"\0\0", "odd": content[:-1], "mask": content[:-1]}
    if change == "gone":
        shard.unlink()
        with pytest.raises(MissingFileError, match=r"train-00001\.bin does not exist"):
            TokenDataset(str(tmp_path / "data"))
        return
    shard.write_bytes(damaged.get(change, b""))
    with pytest.raises(DataError, match=rf"{shard.name}: \d+ bytes, {len(content)} were written"):
        TokenDataset(str(tmp_path / "data"))


def test_a_manifest_that_is_none_is_refused(corpus: Path, tmp_path: Path) -> None:
    make(corpus, tmp_path / "data")
    for content in ('{"tokens": 3}', "[1]", "{"):
        (tmp_path / "data" / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=r"manifest\.json: not a manifest"):
            TokenDataset(str(tmp_path / "data"))
