"""Names of checkpoint directories and the committed ones among them."""

from __future__ import annotations

from collections.abc import Callable

from base import storage
from cherry.checkpoint.checkpointer import Checkpointer
from cherry.checkpoint.naming import newest_checkpoint
from tests.cherry.checkpoint.saving import build


def test_the_newest_is_so_by_number_and_not_by_name(open_saver: Callable[..., Checkpointer]) -> None:
    saver = open_saver(keep_last=2)
    for step in (5, 999_999, 1_000_000):
        saver.save(step, *build(), {"step": step})
    assert storage.list_names(saver.directory) == ["step_1000000", "step_999999"]
    assert newest_checkpoint(saver.directory) == saver.last_saved
    assert saver.last_saved_step == 1_000_000
