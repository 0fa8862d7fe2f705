"""What a model is scored on: as many documents as asked for, of those that have something to score."""

import json
import subprocess
import sys

import pytest
import torch

from cherry.data.prepare import iterate_heldout, prepare
from cherry.scoring import score
from model.quantization.folder import quantize_folder
from model.transformer import DeepseekV3
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf


@pytest.fixture
def chats(mini, tmp_path):
    """Prepared chats, every third of them with an answer that comes after the tokens that are looked at."""
    source = tmp_path / "chats.jsonl"
    answer = {"role": "assistant", "content": "theta theta"}
    short, long = [[{"role": "user", "content": "alpha beta " * count}, answer] for count in (1, 40)]
    lines = [{"messages": long if number % 3 == 0 else short} for number in range(60)]
    source.write_text("\n".join(map(json.dumps, lines)))
    config = mini(f"data.source={source}", "data.format=chat", "data.heldout_fraction=0.5")
    prepare(config.data, vocab_size=config.model.vocab_size, directory=str(tmp_path / "data"))
    return config.model, str(tmp_path / "data")


def test_documents_without_a_scored_token_take_no_other_s_place(chats):
    model, directory = chats
    held = list(iterate_heldout(directory, 32))
    bearing = [document.id for document in held if any(document.loss_mask)]
    assert 0 < len(bearing) < len(held)
    untrained = DeepseekV3(model)
    untrained.init_weights(0)
    result = score(untrained, directory, documents=len(bearing), max_tokens=32, window=32)
    assert [document["id"] for document in result["documents"]] == bearing


def test_a_quantized_model_is_scored_beside_its_own_on_the_numbers_that_an_engine_runs(mini, prepared_data, tmp_path):
    """The program itself: int8 rounds a layer's inputs, which the embedded engine's forward pass does not."""
    model = DeepseekV3(mini().model)
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
    plain, quantized = str(tmp_path / "plain"), str(tmp_path / "int8")
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, model.config))
    save_pretrained(named, plain, model.config, dtype=torch.bfloat16)
    quantize_folder(plain, quantized, format_name="int8")
    documents, directory = 8, str(prepared_data)
    arguments = ["--model_path", quantized, "--reference", plain, "--data_dir", directory]
    arguments += ["--output", str(tmp_path / "nll.json"), "--documents", str(documents), "--max_tokens", "64"]
    subprocess.run([sys.executable, "-m", "cherry.scoring", *arguments], check=True)
    result = json.loads((tmp_path / "nll.json").read_text())
    limits = {"documents": documents, "max_tokens": 64, "window": 32}
    reference = score(load_pretrained(plain, dtype=torch.float32), directory, **limits)
    weights_alone = score(load_pretrained(quantized, dtype=torch.float32), directory, **limits)
    losses = [[one["nll"] for one in scores["documents"]] for scores in (result["reference"], reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert result["reference"]["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    for own, alone in zip(result["documents"], weights_alone["documents"], strict=True):
        assert (own["id"], own["tokens"], own["bytes"]) == (alone["id"], alone["tokens"], alone["bytes"])
        assert 0 < own["kl"] < own["tokens"]
        assert 0.5 * own["tokens"] < own["agreed"] <= own["tokens"]
        assert own["nll"] != pytest.approx(alone["nll"], rel=1e-6)
