"""Files beside the weights: what an export takes over from the folder that a run started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from base.errors import WeightsError
from model.model_config import PRESETS, ModelConfig
from model.weights.companion_files import SourceFiles, write_companions

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CONFIG = ModelConfig(**PRESETS["tiny"])
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def folder(path: Path, *special: str, **files: Any) -> Path:
    """A folder with a tokenizer of these special tokens, and other files by the name before their ending."""
    path.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / f"{name}{'.jinja' if name == 'chat_template' else '.json'}").write_text(text)
    return path


def exported(tmp_path: Path, source: Path | None) -> Path:
    """What an export of a run with <bos> and <eos> writes."""
    target, run = tmp_path / "export", folder(tmp_path / "run", "<bos>", "<eos>")
    write_companions(str(target), CONFIG, str(run), SourceFiles(None if source is None else str(source)))
    return target


def test_without_a_source_the_ids_are_the_config_s_and_there_is_no_template(tmp_path: Path) -> None:
    target = exported(tmp_path, None)
    generation = json.loads((target / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
    assert transformers.AutoTokenizer.from_pretrained(str(target)).chat_template is None


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_template_and_generation_settings_are_read_by_transformers(place: str, tmp_path: Path) -> None:
    files: dict[str, Any] = {"generation_config": {"eos_token_id": [1, 4], "temperature": 0.6, "do_sample": True}}
    files |= {"chat_template": TEMPLATE} if "jinja" in place else {"tokenizer_config": {"chat_template": TEMPLATE}}
    target = exported(tmp_path, folder(tmp_path / "source", "<bos>", "<eos>", **files))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(target))
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<user>hello"
    generation = transformers.GenerationConfig.from_pretrained(str(target))
    assert (generation.eos_token_id, generation.temperature) == ([1, 4], 0.6)


def test_files_that_name_other_special_tokens_are_not_carried_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = folder(
        tmp_path / "source", "<s>", "</s>", chat_template=TEMPLATE, generation_config={"eos_token_id": [1, 4]}
    )
    target = exported(tmp_path, source)
    assert not (target / "chat_template.jinja").exists()
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 1
    assert str(source) in caplog.text


def test_a_source_that_is_gone_gives_nothing(tmp_path: Path) -> None:
    assert (
        json.loads((exported(tmp_path, tmp_path / "gone") / "generation_config.json").read_text())["eos_token_id"] == 1
    )


@pytest.mark.parametrize("name", ["generation_config", "tokenizer_config"])
@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_damaged_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", "<bos>", **{name: content})
    with pytest.raises(WeightsError, match=rf"source/{name}\.json"):
        SourceFiles(str(source))


def test_the_template_that_was_trained_with_wins_over_the_source_s(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", "<bos>", "<eos>", chat_template="own", generation_config={"eos_token_id": [1, 3]})
    source = folder(tmp_path / "source", "<bos>", "<eos>", tokenizer_config={"chat_template": TEMPLATE})
    write_companions(str(tmp_path / "export"), CONFIG, str(run), SourceFiles(str(source)))
    assert transformers.AutoTokenizer.from_pretrained(str(tmp_path / "export")).chat_template == "own"
    assert transformers.GenerationConfig.from_pretrained(str(tmp_path / "export")).eos_token_id == [1, 3]


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"tokenizer_config": {"chat_template": "one"}}, "one"),
        ({"tokenizer_config": {"chat_template": [{"name": "default", "template": "two"}]}}, "two"),
        ({"tokenizer_config": {"chat_template": "one"}, "chat_template": "three"}, "three"),
    ],
)
def test_the_default_template_is_the_one_that_transformers_takes(
    tmp_path: Path, files: dict[str, Any], template: str | None
) -> None:
    source = folder(tmp_path / "source", "<bos>", "<eos>", **files)
    assert SourceFiles(str(source)).default_template == template
    loaded = transformers.AutoTokenizer.from_pretrained(str(source)).chat_template
    assert (loaded.get("default") if isinstance(loaded, dict) else loaded) == template
