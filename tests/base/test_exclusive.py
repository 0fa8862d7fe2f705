"""Files that only one of several writers creates: on a disk, on an object store, and stores that cannot."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from base import storage
from base.errors import ConfigError, MissingFileError, StorageError
from base.exclusive import check_exclusive, create

WRITERS = 16


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty place, on a disk and on an object store."""
    return str(tmp_path) if request.param == "disk" else str(request.getfixturevalue("s3"))


def test_of_writers_at_once_exactly_one_creates_the_file_and_its_content_stays(folder: str) -> None:
    uri = storage.join(folder, "only")
    with ThreadPoolExecutor(WRITERS) as pool:
        won = list(pool.map(lambda number: create(uri, b"%d" % number), range(WRITERS)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)
    assert not create(uri)
    assert storage.list_names(folder) == ["only"], "nothing else is left"


def test_a_disk_without_hard_links_creates_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # what vfat and some FUSE file systems answer
    assert create(str(tmp_path / "only"), b"first")
    assert not create(str(tmp_path / "only"), b"second")
    assert (tmp_path / "only").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["only"]


def test_the_probe_accepts_what_excludes_and_leaves_nothing_behind(folder: str) -> None:
    storage.write_bytes(storage.join(folder, "kept"), b"")
    check_exclusive(folder)
    assert storage.list_names(folder) == ["kept"]


def test_a_store_that_overwrites_all_the_same_is_refused_with_what_to_do(unconditional_s3: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_exclusive(unconditional_s3)
    text = str(caught.value)
    assert text.startswith(f"{unconditional_s3}: this store ignores the condition of a put (If-None-Match: *)")
    assert "Use a store that honours it" in text and "a directory on a file system that all hosts share" in text
    assert storage.list_names(unconditional_s3) == []


def test_storage_without_a_conditional_put_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    uri = "memory://nothing-here"
    for use in (check_exclusive, create):
        with pytest.raises(ConfigError, match=r"storage of this kind \(memory\) has no conditional put"):
            use(uri)
    assert not storage.exists(uri)


def test_a_missing_bucket_and_a_store_that_is_away_are_no_refusals_of_the_condition(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingFileError):
        create("s3://no-such-bucket-here/only")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()  # a client keeps the address that it was made with
    with pytest.raises(StorageError, match="storage failed at"):
        create(f"{s3}/only")
