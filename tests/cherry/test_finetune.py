"""From a pre-trained run's export to a model fine-tuned on chats: wholly, and by adapters merged on export."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from base.config import dump
from cherry.data.prepare import iterate_heldout, prepare
from cherry.export import export
from cherry.heldout import model_score, sums_of
from cherry.trainer import Trainer
from model.weights.pretrained import load_pretrained

pytestmark = pytest.mark.slow


@pytest.fixture
def base(mini, prepared_data, tmp_path, group):
    """The export of a pre-trained run."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "data").symlink_to(prepared_data)
    config = mini("train.steps=60", "train.learning_rate=6e-3", "checkpoint.every_steps=60")
    (directory / "config.yaml").write_text(dump(config))
    Trainer(config, str(directory)).run()
    export(str(directory), dtype=torch.float32)
    return directory / "export"


@pytest.fixture
def finetune(mini, base, tmp_path):
    """Starts fine-tuning runs on one set of chats, by name, with further overrides."""
    source = tmp_path / "chats.jsonl"
    questions = ["alpha beta", "gamma delta", "epsilon zeta", "eta theta"]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{questions[number % 4]} {questions[number % 3]} {number}"},
                {"role": "assistant", "content": "theta theta alpha alpha"},
            ]
        }
        for number in range(120)
    ]
    source.write_text("\n".join(map(json.dumps, chats)))
    data = [f"data.source={source}", "data.format=chat", f"data.tokenizer={base / 'tokenizer.json'}"]

    def start(name, *overrides):
        directory = tmp_path / name
        config = mini(f"init_from={base}", *data, "train.steps=20", "train.learning_rate=1e-2", *overrides)
        prepare(config.data, vocab_size=config.model.vocab_size, directory=str(directory / "data"))
        (directory / "config.yaml").write_text(dump(config))
        return directory, Trainer(config, str(directory))

    return start


def assistant_loss(model, directory):
    documents = list(iterate_heldout(str(directory / "data"), 32))
    nll = sums_of(model_score(model, torch.device("cpu")), documents, 32).sum()
    return float(nll) / sum(sum(document.loss_mask) for document in documents)


def said_by_the_assistant(tokens):
    """For each token whether it is an answer's, or the eos behind it: by the roles' tokens alone."""
    marks, role = [], None
    for token in tokens:
        marks.append(role == 4)  # <|assistant|>
        if token in (2, 3, 4):
            role = token
            marks[-1] = False
        elif token == 1:
            role = None
    return marks


def test_only_the_assistant_bears_loss_and_its_loss_falls_from_the_imported_weights(base, finetune):
    directory, trainer = finetune("whole")
    pretrained = load_pretrained(str(base), dtype=torch.float32)
    dataset = trainer.dataset
    rows = [dataset.sequence(index) for index in range(len(dataset))]
    stream = [int(token) for tokens, _ in rows for token in tokens[:-1]]
    bears = [bool(mark) for _, marks in rows for mark in marks[:-1]]
    assert bears == said_by_the_assistant(stream)
    assert 0.1 < sum(bears) / len(bears) < 0.9

    ((tokens, targets, _),) = trainer.batches.read(0).micro_batches
    logits = pretrained.logits(pretrained(tokens).hidden_BTD)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert trainer._step().loss == pytest.approx(expected.item(), rel=1e-5)

    before = assistant_loss(pretrained, directory)
    trainer.run()
    export(str(directory), dtype=torch.float32)
    after = assistant_loss(load_pretrained(str(directory / "export"), dtype=torch.float32), directory)
    assert after < 0.5 * before


def test_adapters_alone_are_trained_and_their_export_is_a_plain_model_that_transformers_loads(base, finetune):
    import transformers

    directory, trainer = finetune(
        "lora", "lora={rank: 8, alpha: 32}", "train.learning_rate=3e-2", "checkpoint.every_steps=10"
    )
    pretrained = load_pretrained(str(base), dtype=torch.float32)
    before = assistant_loss(pretrained, directory)
    trainer.run()
    frozen = pretrained.state_dict()
    for name, value in trainer.model.state_dict().items():
        if name in frozen and "e_score_correction_bias" not in name:
            assert torch.equal(value, frozen[name]), name
    from cherry.checkpoint.checkpointer import reader_of

    stored = reader_of(trainer.checkpointer.last_saved).read_metadata().state_dict_metadata
    states = [name for name in stored if name.startswith("optimizer.state")]
    assert states
    assert all("lora_" in name for name in states)

    resumed = Trainer(trainer.config, str(directory))
    assert resumed.progress.step == 20
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    resumed.close()

    export(str(directory), dtype=torch.float32)
    loaded = load_pretrained(str(directory / "export"), dtype=torch.float32)
    assert assistant_loss(loaded, directory) < 0.95 * before
    tokens = trainer.batches.read(0).micro_batches[0].tokens_BT
    model = trainer.model.eval()
    with torch.no_grad():
        expected = model.logits(model(tokens).hidden_BTD)
        torch.testing.assert_close(loaded.logits(loaded(tokens).hidden_BTD), expected, rtol=1e-4, atol=1e-4)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory / "export", dtype=torch.float32)
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=2e-4)
