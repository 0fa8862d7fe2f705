"""What a model is scored on: as many documents as asked for, of those that have something to score."""

import json

import pytest

from cherry.data.prepare import iterate_heldout, prepare
from cherry.scoring import score
from model.transformer import DeepseekV3


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
