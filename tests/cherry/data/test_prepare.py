"""Prepared data: what is written, what is read back, what is kept from training, and what breaks in our words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from base import storage
from base.errors import ConfigError, DataError, DiskFullError, MissingFileError
from cherry.data.corpus import is_heldout
from cherry.data.prepare import iterate_heldout, prepare, zlib_bits_per_byte
from cherry.data.shards import SHARD_TOKENS, TokenDataset
from cherry.job_config import DataConfig
from tests.cherry.data import templates
from tests.cherry.data.preparing import VOCAB, make, stream

ROOT = Path(__file__).parents[3]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_training_documents_come_back_whole_between_their_boundaries(corpus: Path, tmp_path: Path) -> None:
    manifest = make(corpus, tmp_path / "data", sequence_length=7)
    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    tokens = stream(tmp_path / "data")
    assert len(tokens) == manifest.sequences * 7 + 1
    assert manifest.tokens - len(tokens) < 7
    assert tokens[0] == manifest.bos_id
    documents: list[list[int]] = []
    for before, token in zip([manifest.eos_id, *tokens], tokens, strict=False):
        if token == manifest.bos_id:
            assert before == manifest.eos_id
            documents.append([])
        documents[-1].append(token)
    whole = [document for document in documents if document[-1] == manifest.eos_id]
    texts = [tokenizer.decode(document, skip_special_tokens=True) for document in whole]
    files = sorted(path for path in corpus.glob("*.txt") if not is_heldout(path.name, seed=0, fraction=0.2))
    assert texts == [path.read_text() for path in files][: len(texts)]
    assert len(files) - len(texts) <= 1


def test_the_manifest_counts_what_is_there(corpus: Path, tmp_path: Path) -> None:
    manifest = make(corpus, tmp_path / "data")
    texts = {path.name: path.read_bytes() for path in sorted(corpus.glob("*.txt"))}
    held = [name for name in texts if is_heldout(name, seed=0, fraction=0.2)]
    assert (manifest.documents, manifest.files, manifest.skipped_files) == (60, 60, 0)
    assert manifest.bytes == sum(map(len, texts.values()))
    assert manifest.heldout["documents"] == len(held)
    joined = b"".join(texts[name] for name in held)
    assert manifest.heldout["bytes"] == len(joined)
    assert manifest.heldout["zlib_bits_per_byte"] == pytest.approx(8 * len(zlib.compress(joined, 9)) / len(joined))
    assert manifest.tokens == (tmp_path / "data" / "train-00000.bin").stat().st_size // 2
    assert storage.read_json(str(tmp_path / "data" / "manifest.json"))["digest"] == manifest.digest
    lines = (tmp_path / "data" / "heldout.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == held


def test_the_same_documents_give_the_same_files_in_any_place_and_process(corpus: Path, tmp_path: Path) -> None:
    make(corpus, tmp_path / "one")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(corpus.glob("*.txt"), reverse=True):
        (copy / path.name).write_bytes(path.read_bytes())
    program = (
        "import sys; from cherry.job_config import DataConfig; from cherry.data.prepare import prepare\n"
        f"prepare(DataConfig(source=sys.argv[1], sequence_length=16, heldout_fraction=0.2), vocab_size={VOCAB},"
        " directory=sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", program, str(copy), str(tmp_path / "two")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    first, second = contents(tmp_path / "one"), contents(tmp_path / "two")
    for files in (first, second):
        record = json.loads(files.pop("manifest.json"))
        assert record.pop("source")
        marker = json.loads(files.pop("COMMITTED"))
        assert marker["config"].pop("source")
        assert marker["files"].pop("manifest.json")
        record |= marker
        files["record"] = json.dumps(record).encode()
    assert first == second


def test_the_digest_knows_names_contents_and_roles(tmp_path: Path, chats: Path) -> None:
    def digest(name: str, files: dict[str, str], **options: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(text)
        return make(folder, tmp_path / f"{name}-data", **options).digest

    texts = {f"{number}.txt": f"text {number} " * 20 for number in range(30)}
    first = digest("first", texts)
    assert digest("same", dict(reversed(texts.items()))) == first
    assert digest("changed", {**texts, "3.txt": texts["3.txt"] + "."}) != first
    renamed = {("x.txt" if name == "3.txt" else name): text for name, text in texts.items()}
    assert digest("renamed", renamed) != first
    content = chats.read_text()
    swapped = content.replace('"user"', '"system"', 1)
    assert digest("chat", {"c.jsonl": content}, format="chat") != digest("chat2", {"c.jsonl": swapped}, format="chat")


def test_another_seed_holds_out_others_and_the_number_of_documents_does_not_move_any(
    corpus: Path, tmp_path: Path
) -> None:
    def held(name: str, source: object = corpus, **options: Any) -> set[str]:
        make(source, tmp_path / name, **options)
        return {document.id for document in list(iterate_heldout(str(tmp_path / name), None))}

    first = held("first")
    assert held("other", seed=1) != first
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(corpus.glob("*.txt"))[::2]:
        (fewer / path.name).write_bytes(path.read_bytes())
    assert held("half", source=fewer) == {name for name in first if int(name[:2]) % 2 == 0}


@pytest.mark.parametrize("max_tokens", [None, 1, 7, 40])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_held_out_tokens_spell_exactly_the_bytes_that_they_are_counted_for(
    corpus: Path, chats: Path, tmp_path: Path, max_tokens: int | None, kind: str
) -> None:
    make(chats if kind == "chat" else corpus, tmp_path / "data", format=kind)
    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    documents = list(iterate_heldout(str(tmp_path / "data"), max_tokens))
    assert documents
    for document in documents:
        assert document.tokens[0] == 0
        assert not document.loss_mask[0]
        assert len(document.tokens) == len(document.loss_mask)
        if max_tokens is not None:
            assert len(document.tokens) <= max_tokens + 1
        scored = [t for t, bears in zip(document.tokens, document.loss_mask, strict=True) if bears]
        assert 1 not in scored
        assert tokenizer.decode(scored, skip_special_tokens=False) == document.text
        assert document.bytes == len(document.text.encode())


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_cut_never_falls_inside_a_character(tmp_path: Path, kind: str) -> None:
    """Characters that no training document has: each is three tokens of one byte."""
    rare = "".join(map(chr, range(0x4E00, 0x4E10)))
    source = tmp_path / "documents.jsonl"
    message = {"messages": [{"role": "user", "content": "rare?"}, {"role": "assistant", "content": f"a{rare}"}]}
    held = [i for i in range(1, 60) if is_heldout(f"documents.jsonl:{i}", seed=0, fraction=0.2)]
    lines = []
    for number in range(1, 60):
        text = f"a{rare}" if number in held else "common words alone " * 5
        message["messages"][1]["content"] = text
        lines.append(json.dumps(message if kind == "chat" else {"text": text}))
    source.write_text("\n".join(lines))
    make(source, tmp_path / "data", format="chat" if kind == "chat" else "jsonl")
    whole = next(iterate_heldout(str(tmp_path / "data"), None))
    before = whole.loss_mask.index(True)
    assert len(whole.tokens) == before + 1 + 3 * 16
    for tokens in range(1, 3 * 16 + 2):
        document = next(iterate_heldout(str(tmp_path / "data"), before - 1 + tokens))
        assert document.text == f"a{rare}"[: 1 + (tokens - 1) // 3]
        assert sum(document.loss_mask) == 1 + (tokens - 1) // 3 * 3
        assert document.bytes == sum(document.loss_mask)


def test_whole_held_out_documents_are_the_files(corpus: Path, tmp_path: Path) -> None:
    manifest = make(corpus, tmp_path / "data")
    documents = list(iterate_heldout(str(tmp_path / "data"), None))
    assert [document.text for document in documents] == [(corpus / document.id).read_text() for document in documents]
    texts = [document.text for document in documents]
    assert zlib_bits_per_byte(texts) == manifest.heldout["zlib_bits_per_byte"]


def test_zlib_is_one_stream_at_its_hardest() -> None:
    texts = ["the same words again and again, " * 3] * 20
    joined = "".join(texts).encode()
    assert zlib_bits_per_byte(texts) == 8 * len(zlib.compress(joined, 9)) / len(joined)
    apart = 8 * sum(len(zlib.compress(text.encode(), 9)) for text in texts) / len(joined)
    assert zlib_bits_per_byte(texts) < apart


def test_progress_rises_to_the_end(corpus: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    config = DataConfig(source=str(corpus), sequence_length=16, heldout_fraction=0.2)
    prepare(
        config,
        vocab_size=VOCAB,
        directory=str(tmp_path / "data"),
        on_progress=lambda line, fraction: seen.append((line, fraction)),
    )
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert len(seen) >= 4


def test_data_may_be_prepared_again_inside_its_own_source(corpus: Path, tmp_path: Path) -> None:
    for path in corpus.glob("*.txt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = make(tmp_path, tmp_path / "data")
    assert make(tmp_path, tmp_path / "data") == first


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["", " "], "no document with text in 2 files"),
        ([b"\xff\xfe", b"\xff"], "in 2 files, 2 of which are not UTF-8"),
        (["only one"], r"1 documents give . for training and . held out at data\.heldout_fraction 0\.2"),
        (["a"] * 30, r"tokens do not fill one sequence of 4096 \+ 1"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, texts: list[str | bytes], message: str) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        make(folder, tmp_path / "data", sequence_length=4096)
    assert not storage.is_committed(str(tmp_path / "data"))


def test_a_sequence_needs_the_token_after_it_too(corpus: Path, tmp_path: Path) -> None:
    tokens = make(corpus, tmp_path / "data").tokens
    assert make(corpus, tmp_path / "data", sequence_length=tokens - 1).sequences == 1
    with pytest.raises(DataError, match="do not fill one sequence"):
        make(corpus, tmp_path / "data", sequence_length=tokens)


@pytest.mark.parametrize("held_out", [0, 1, 2])
def test_two_documents_must_be_held_out_for_a_comparison(tmp_path: Path, held_out: int) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    names = [f"{number}.txt" for number in range(60)]
    held = [name for name in names if is_heldout(name, seed=0, fraction=0.2)][:held_out]
    for name in [name for name in names if not is_heldout(name, seed=0, fraction=0.2)] + held:
        (folder / name).write_text("some words " * 20)
    if held_out == 2:
        assert make(folder, tmp_path / "data").heldout["documents"] == 2
        return
    with pytest.raises(DataError, match=rf"and {held_out} held out at .* and a comparison 2"):
        make(folder, tmp_path / "data")


def test_a_failure_leaves_nothing_that_looks_prepared(corpus: Path, tmp_path: Path) -> None:
    make(corpus, tmp_path / "data")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match=r"broken\.jsonl line 2"):
        make(broken, tmp_path / "data")
    with pytest.raises(MissingFileError, match="no finished output"):
        TokenDataset(str(tmp_path / "data"))
    with pytest.raises(MissingFileError, match="no finished output"):
        list(iterate_heldout(str(tmp_path / "data"), None))


def test_shards_are_mapped_from_a_local_disk_alone(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="memory-mapped"):
        make(corpus, "memory://data")


@pytest.mark.parametrize("shard_tokens", [SHARD_TOKENS, 1000])
def test_a_disk_that_fills_up_is_reported_as_such(
    small_disk: Callable[[int], Path], tmp_path: Path, shard_tokens: int
) -> None:
    folder, target = tmp_path / "corpus", small_disk(96) / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(40):
        (folder / f"{number}.txt").write_text("".join(map(chr, generator.integers(33, 127, size=3000))))
    with pytest.raises(DiskFullError, match="no space left"):
        make(folder, target, shard_tokens=shard_tokens)
    assert not storage.is_committed(str(target))


@pytest.mark.slow
def test_the_embedded_default_is_prepared_whole(tmp_path: Path) -> None:
    """The standard library's own sources: real text, with test files that are broken on purpose."""
    config = DataConfig(sequence_length=256, heldout_fraction=0.05, max_documents=400)
    manifest = prepare(config, vocab_size=2048, directory=str(tmp_path / "data"))
    assert manifest.documents == 400
    assert manifest.vocab_size == 2048
    assert manifest.skipped_files > 0
    assert 2.5 < manifest.bytes * (1 - manifest.heldout["bytes"] / manifest.bytes) / manifest.tokens < 4.5
    assert 1.2 < manifest.heldout["zlib_bits_per_byte"] < 2.5


def test_a_chat_is_prepared_with_the_tokenizer_s_own_template_which_is_told_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    templates.tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(templates.CHATML)
    record = {"messages": [{"role": "user", "content": "hi <|im_end|>"}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps(record)] * 40))
    told: list[str] = []
    config = DataConfig(
        source=str(tmp_path / "chats.jsonl"),
        format="chat",
        tokenizer=str(folder),
        sequence_length=16,
        heldout_fraction=0.3,
    )
    directory = str(tmp_path / "data")
    prepare(config, vocab_size=600, directory=directory, on_progress=lambda line, _: told.append(line))
    assert told[-1].endswith(f"chat template: the one in {folder}")
    assert (tmp_path / "data" / "chat_template.jinja").read_text() == templates.CHATML
    generation = json.loads((tmp_path / "data" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, templates.tokenizer().token_to_id("<|im_end|>")]
    control = templates.tokenizer().token_to_id("<|im_end|>")
    for document in iterate_heldout(directory, None):
        assert document.text == "yes"
        assert document.tokens.count(control) == 2
        assert sum(document.loss_mask) == len(templates.tokenizer().encode("yes").ids)


def test_a_broken_conversation_is_named_when_it_is_rendered(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    bad = {"messages": [*good["messages"], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, [good, good, bad, good])))
    with pytest.raises(DataError, match=r"chats\.jsonl:3: message 3 has the key 'tool_calls'"):
        make(tmp_path / "chats.jsonl", tmp_path / "data", format="chat", heldout_fraction=0.01)


def test_given_weights_never_get_a_new_tokenizer(corpus: Path, tmp_path: Path) -> None:
    config = DataConfig(source=str(corpus), sequence_length=16, heldout_fraction=0.2)
    weights = tmp_path / "weights"
    weights.mkdir()
    with pytest.raises(DataError, match="given weights mean nothing under a new tokenizer"):
        prepare(config, vocab_size=600, directory=str(tmp_path / "data"), weights=str(weights))
    templates.tokenizer().save(str(weights / "tokenizer.json"))
    prepare(config, vocab_size=600, directory=str(tmp_path / "data"), weights=str(weights))
    prepared = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    assert prepared.get_vocab() == templates.tokenizer().get_vocab()
    with pytest.raises(DataError, match=r"weights/tokenizer\.json: has tokens up to id"):
        prepare(config, vocab_size=300, directory=str(tmp_path / "data"), weights=str(weights))
