"""Fixture of the checkpoint tests: checkpointers that are closed after the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cherry.checkpoint.checkpointer import Checkpointer

Open = Callable[..., Checkpointer]


@pytest.fixture
def open_saver(group: dist.ProcessGroup, tmp_path: Path) -> Iterator[Open]:
    """Makes checkpointers that are closed after the test."""
    made: list[Checkpointer] = []

    def open_one(directory: Path = tmp_path / "checkpoints", *, kind: Any = Checkpointer, **options: Any) -> Any:
        settings: dict[str, Any] = {"keep_last": 9, "asynchronous": False, "fence": None, **options}
        made.append(kind(str(directory), group=group, **settings))
        return made[-1]

    yield open_one
    for saver in made:
        saver.close()
