"""From a checkpoint to a Hugging Face folder and its score: the same weights, and the same held-out loss."""

import json
import sys

import pytest
import torch

from base.config import dump
from base.errors import CheckpointError, MissingFileError
from cherry import export, scoring
from cherry.data.prepare import prepare
from cherry.data.shards import TokenDataset
from cherry.trainer import Trainer
from model.transformer import DeepseekV3
from model.weights.companion_files import SourceFiles, write_companions
from model.weights.pretrained import load_into, load_pretrained
from tests.cherry.data import templates


@pytest.fixture
def run(mini, prepared_data, tmp_path, group):
    """A trained run directory and its trainer."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "data").symlink_to(prepared_data)
    config = mini("train.steps=6", "checkpoint.every_steps=3")
    (directory / "config.yaml").write_text(dump(config))
    trainer = Trainer(config, str(directory))
    return directory, trainer, trainer.run()


def test_the_export_holds_the_trained_weights_and_scores_as_training_did(run, tmp_path, monkeypatch):
    directory, trainer, result = run
    assert export.export(str(directory), dtype=torch.float32) == result["checkpoint"]
    loaded = load_pretrained(str(directory / "export"), dtype=torch.float32)
    expected = trainer.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert (directory / "export" / "tokenizer.json").read_bytes() == (
        directory / "data" / "tokenizer.json"
    ).read_bytes()

    def score(*flags):
        output = tmp_path / "score.json"
        limits = ["--documents=64", "--max_tokens=32", f"--output={output}", f"--data_dir={directory / 'data'}"]
        monkeypatch.setattr(sys, "argv", ["scoring", *flags, *limits])
        scoring.main()
        return json.loads(output.read_text())

    scored = score(f"--model_path={directory / 'export'}")
    assert scored["loss"] == pytest.approx(result["heldout_loss"], rel=1e-6)
    assert scored["bits_per_byte"] == pytest.approx(result["heldout_bits_per_byte"], rel=1e-6)
    assert sum(d["nll"] for d in scored["documents"]) / scored["tokens"] == pytest.approx(scored["loss"])
    untrained = score("--untrained", f"--config={directory / 'config.yaml'}")
    assert untrained["loss"] > scored["loss"]
    assert [d["id"] for d in untrained["documents"]] == [d["id"] for d in scored["documents"]]


def test_an_older_checkpoint_can_be_named_and_bf16_is_what_the_file_says(run):
    directory, trainer, _ = run
    older = str(directory / "train" / "checkpoints" / "step_3")
    assert export.export(str(directory), dtype=torch.bfloat16, checkpoint=older) == older
    assert json.loads((directory / "export" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_pretrained(str(directory / "export"), dtype=torch.float32)
    assert not torch.equal(loaded.norm.weight, trainer.model.norm.weight.bfloat16().float())


def test_the_release_s_fp8_from_the_command_line(run, monkeypatch):
    directory, trainer, _ = run
    monkeypatch.setattr(sys, "argv", ["export", f"--run_dir={directory}", "--dtype=fp8"])
    export.main()
    written = json.loads((directory / "export" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16"
    assert written["quantization_config"]["weight_block_size"] == [128, 128]
    model = DeepseekV3(trainer.model.config)
    load_into(model, str(directory / "export"))
    loaded = model.state_dict()
    for name, value in trainer.model.state_dict().items():
        # e4m3 has 3 bits after the point, bf16 7: half a step of each
        assert (loaded[name] - value).norm() <= value.norm() / 16, name


@pytest.mark.parametrize("init_from", ["{}", "{}/weights.pt"])
def test_chat_template_and_generation_settings_of_the_source_travel_with_the_weights(run, tmp_path, init_from, mini):
    directory, _, _ = run
    source = tmp_path / "source"
    source.mkdir()
    generation = {"eos_token_id": [1, 4], "temperature": 0.6, "_from_model_config": True}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ bos_token }}", "use_fast": 1}))
    (source / "tokenizer.json").write_bytes((directory / "data" / "tokenizer.json").read_bytes())
    config = mini("train.steps=6", "checkpoint.every_steps=3", f"init_from={init_from.format(source)}")
    (directory / "config.yaml").write_text(dump(config))
    export.export(str(directory), dtype=torch.float32)
    exported = directory / "export"
    assert json.loads((exported / "generation_config.json").read_text()) == generation
    assert (exported / "chat_template.jinja").read_text() == "{{ messages[0].content }}!"
    described = json.loads((exported / "tokenizer_config.json").read_text())
    assert described["chat_template"] == "{{ bos_token }}"
    assert described["bos_token"], "the rest is the run's own"


def test_a_corrupt_shard_is_not_exported(run):
    directory, _, result = run
    shard = f"{result['checkpoint']}/__0_0.distcp"
    with open(shard, "r+b") as handle:
        handle.seek(1000)
        handle.write(b"\xff" * 8)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: other content"):
        export.export(str(directory), dtype=torch.float32)
    assert not (directory / "export").exists()


def test_a_config_that_changed_since_and_a_run_without_a_checkpoint(run, mini, tmp_path):
    directory, _, _ = run
    (directory / "config.yaml").write_text(dump(mini("model.moe_intermediate_size=24")))
    with pytest.raises(CheckpointError, match=r"wrong shape of layers\.1\.mlp\.experts\.w13_EFD"):
        export.export(str(directory), dtype=torch.float32)
    (tmp_path / "config.yaml").write_text(dump(mini()))
    with pytest.raises(MissingFileError, match="holds no committed checkpoint"):
        export.export(str(tmp_path), dtype=torch.float32)
    with pytest.raises(MissingFileError, match=r"nowhere: holds no config\.yaml"):
        export.export(str(tmp_path / "nowhere"), dtype=torch.float32)


@pytest.mark.parametrize("shape", ["chatml", "v3", "default"])
def test_a_chat_s_export_renders_in_transformers_what_was_trained_on(shape, tmp_path, mini):
    """The prepared tokens of a conversation are those of `apply_chat_template` on the exported tokenizer."""
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "tokenizer"
    source.mkdir()
    templates.tokenizer().save(str(source / "tokenizer.json"))
    if shape != "default":
        (source / "chat_template.jinja").write_text(templates.ALL[shape])
    talk = [{"role": "user", "content": "a fox?"}, {"role": "assistant", "content": "the quick one"}]
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 40))
    keys = (f"data.source={tmp_path}/chats.jsonl", "data.format=chat", f"data.tokenizer={source}")
    config = mini(*keys, "data.sequence_length=8", "data.heldout_fraction=0.3", "model.vocab_size=512")
    run = str(tmp_path / "run")
    prepare(config.data, vocab_size=512, directory=f"{run}/data")
    write_companions(f"{run}/export", config.model, f"{run}/data/tokenizer.json", SourceFiles(None))
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{run}/export")
    rendered = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
    trained = TokenDataset(f"{run}/data").sequence(0)[0].tolist()
    skip = int(shape == "chatml")  # which writes no bos: a document begins with it all the same
    assert trained[skip:] == rendered[: len(trained) - skip]
    ends = transformers.GenerationConfig.from_pretrained(f"{run}/export").eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>" if shape == "chatml" else "<eos>") in ends
