"""Growing text is whole characters, and all of it is what decoding at once gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from anything.engine.detokenizer import IncrementalDetokenizer, Tokenizer
from base.errors import MissingFileError, WeightsError

TEXTS = ["naïve café — “quoted”", "日本語のテキスト", "👩‍👩‍👧‍👦 family 🇳🇴", "plain ascii\n\ttext"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with merges that end in the middle of characters."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
    library.train_from_iterator([*TEXTS, "日日日 本本 éé"] * 20, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer(str(folder))


@pytest.mark.parametrize("text", TEXTS)
def test_every_piece_is_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer.encode(text * 8)]
    assert "".join(pieces) == text * 8
    assert detokenizer.finish() == ""
    assert "\ufffd" not in "".join(pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=120))
def test_any_tokens_give_what_decoding_at_once_gives(tokenizer: Tokenizer, tokens: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = "".join(detokenizer.push(token) for token in tokens) + detokenizer.finish()
    assert text == tokenizer.decode(tokens)


def test_a_long_run_of_broken_bytes_still_comes_out(tokenizer: Tokenizer) -> None:
    broken = next(token for token in range(300) if tokenizer.decode([token]) == "\ufffd")
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = "".join(detokenizer.push(broken) for _ in range(50))
    assert len(text) >= 47


def test_a_folder_that_asks_for_a_first_token_gets_it_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    library = Library.from_str(json.dumps(json.loads(tokenizer._tokenizer.to_str())))
    library.save(str(tmp_path / "tokenizer.json"))
    described = {"add_bos_token": True, "bos_token": {"content": "<eos>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    plain, first = tokenizer.encode("ab"), Tokenizer(str(tmp_path))
    assert first.encode("ab") == [0, *plain]
    # Once also for a prompt that begins with it, where its name is that token.
    assert Tokenizer(str(tmp_path), control_tokens=True).encode("<eos>ab") == [0, *plain]


CONTROL = ["<eos>", "<｜User｜>", "<think>", "[INST]"]


@pytest.fixture(scope="module")
def control_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Control tokens marked special and not, and a run of blanks, which is text; prompts cut and padded."""
    library = Library.from_str(tokenizer._tokenizer.to_str())
    library.add_tokens([*CONTROL[1:], "    "])
    library.enable_truncation(8)
    library.enable_padding(length=8)
    folder = tmp_path_factory.mktemp("control")
    library.save(str(folder / "tokenizer.json"))
    return str(folder)


@settings(deadline=None)
@given(text=st.lists(st.sampled_from([*CONTROL, "    ", " ", "a", "é"]), max_size=12).map("".join))
def test_no_prompt_becomes_a_control_token(control_folder: str, text: str) -> None:
    tokenizer = Tokenizer(control_folder)
    tokens = tokenizer.encode(text)
    assert not {tokenizer._tokenizer.token_to_id(name) for name in CONTROL} & set(tokens)
    assert tokenizer.decode(tokens) == text
    blanks = tokenizer._tokenizer.token_to_id("    ")
    assert (blanks in tokens) == ("    " in text)


def test_a_server_that_allows_it_takes_names_of_control_tokens_for_them(control_folder: str) -> None:
    tokenizer = Tokenizer(control_folder, control_tokens=True)
    assert tokenizer.encode("".join(CONTROL)) == [tokenizer._tokenizer.token_to_id(name) for name in CONTROL]
    # What the model writes is told as before.
    plain = Tokenizer(control_folder)
    assert plain.decode(tokenizer.encode("<think>a<eos>")) == "<think>a"


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"tokenizer\.json does not exist"):
        Tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match=r"is no tokenizer\.json"):
        Tokenizer(str(tmp_path))
