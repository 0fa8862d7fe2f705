"""Sizes and digests of a checkpoint's files: a round trip, damage that is named, and errors of writing."""

import pytest

from base.errors import CheckpointError
from cherry.checkpoint.checkpointer import restore
from tests.cherry.checkpoint.saving import build, saver_of


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "metadata"])
def test_a_damaged_file_is_named(tmp_path, group, damage):
    model, optimizer = build()
    saver = saver_of(tmp_path, group, asynchronous=False)
    saver.save(1, model, optimizer, {"step": 1})
    saver.close()
    victim = tmp_path / "step_1" / (".metadata" if damage == "metadata" else "__0_0.distcp")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content[:-7] if damage == "truncate" else content)
    with pytest.raises(CheckpointError) as caught:
        restore(saver.last_saved, model, optimizer, group)
    assert str(victim) in str(caught.value)
    assert "Remove this step's directory" in str(caught.value)
