"""Sizes and digests of a checkpoint's files: a round trip, damage that is named, and errors of writing."""

import errno
import hashlib

import pytest
from torch.distributed.checkpoint import CheckpointException

from base.errors import CheckpointError, DiskFullError, StorageError
from cherry.checkpoint.checkpointer import restore
from cherry.checkpoint.digests import as_storage_error, digest_own, verify
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


def test_digests_of_all_ranks_are_those_of_the_files(tmp_path):
    names = ["__0_0.distcp", "__1_0.distcp", "__10_0.distcp", ".metadata"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 1000)
    files = {}
    for rank in (0, 1, 10):
        own = digest_own(str(tmp_path), names[:-1], rank)
        assert not own.keys() & files.keys()
        files |= own
    expected = {name: name.encode() * 1000 for name in names}
    assert files == {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in expected.items()}
    verify(str(tmp_path), {"files": files})
    (tmp_path / "__1_0.distcp").write_bytes(b"cut")
    (tmp_path / "__10_0.distcp").unlink()
    with pytest.raises(CheckpointError) as caught:
        verify(str(tmp_path), {"files": files})
    text = str(caught.value)
    assert f"{tmp_path}/__1_0.distcp: 3 bytes, 12000 were committed" in text
    assert f"{tmp_path}/__10_0.distcp" in text
    assert "__0_0.distcp" not in text


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (RuntimeError("[enforce fail at inline_container.cc:668] . No space left on device"), DiskFullError),
        (RuntimeError("a bug of the writer"), StorageError),
        (PermissionError(errno.EACCES, "Permission denied"), StorageError),
    ],
)
def test_a_failed_write_is_an_error_of_the_disk_or_of_the_storage(tmp_path, failure, kind):
    for error in (failure, CheckpointException("write", {0: (failure, None)})):
        found = as_storage_error(error, str(tmp_path / "step_1"))
        assert type(found) is kind
        assert str(tmp_path / "step_1") in str(found)
        assert as_storage_error(found, "elsewhere") is found, "an error of the family stays"
