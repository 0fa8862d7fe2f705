"""Sources of the data tests: plain documents and conversations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

WORDS = ["alpha", "beta", "gamma", "delta", "naïve", "🙂", "日本", "epsilon"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 20 to 100 words."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for number in range(60):
        words = generator.choice(WORDS, size=int(generator.integers(20, 100)))
        (folder / f"{number:02d}.txt").write_text(f"{number}: " + " ".join(words))
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = []
    for number in range(60):
        question = {"role": "user", "content": f"what is number {number}? 🙂"}
        answer = {"role": "assistant", "content": f"the number is {number}, naïve 日本 {'yes ' * (number % 7)}"}
        lines.append(json.dumps({"messages": [question, answer, question, answer]}))
    path.write_text("\n".join(lines))
    return path
