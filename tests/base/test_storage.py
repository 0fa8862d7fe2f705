"""Storage by URI: the same behaviour on a local disk, in memory, and on an S3 server over HTTP."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from base import storage
from base.errors import ConfigError, MissingFileError, StorageError

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["path", "file", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of a place that holds nothing yet."""
    if request.param == "path":
        return str(tmp_path / "store")
    if request.param == "file":
        return f"file://{tmp_path}/store"
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return str(request.getfixturevalue("s3")) + "/store"


def test_what_is_written_is_read_back(folder: str) -> None:
    uri = storage.join(folder, "a", "b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"\x00old")
    storage.write_bytes(uri, b"\x00new content")
    assert storage.read_bytes(uri) == b"\x00new content"
    assert storage.exists(uri)
    assert storage.exists(storage.join(folder, "a"))
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""


def test_json_is_written_readable_and_read_back(folder: str) -> None:
    uri = storage.join(folder, "x.json")
    storage.write_json(uri, {"b": [1, 2.5, None], "a": "ü"})
    assert storage.read_json(uri) == {"b": [1, 2.5, None], "a": "ü"}
    assert storage.read_bytes(uri).startswith(b'{\n  "b"')


def test_a_reader_can_seek(folder: str) -> None:
    uri = storage.join(folder, "numbers")
    storage.write_bytes(uri, bytes(range(200)))
    with storage.open_read(uri) as handle:
        handle.seek(150)
        assert handle.read(3) == bytes([150, 151, 152])
        handle.seek(-1, os.SEEK_END)
        assert handle.read() == bytes([199])


def test_what_is_missing_is_named(folder: str) -> None:
    uri = storage.join(folder, "none")
    with pytest.raises(MissingFileError, match="none does not exist"):
        storage.read_bytes(uri)
    with pytest.raises(MissingFileError, match=r"no COMMITTED file"):
        storage.read_commit(folder)
    assert storage.list_names(folder) == []
    storage.remove_tree(folder)


def test_names_directly_inside_are_listed_in_order(folder: str) -> None:
    for name in ("b/deep/1", "a", "b/2", "c"):
        storage.write_bytes(storage.join(folder, name), b"x")
    assert storage.list_names(folder) == ["a", "b", "c"]
    assert storage.list_names(folder + "/") == ["a", "b", "c"]
    assert storage.list_names(storage.join(folder, "b")) == ["2", "deep"]


def test_files_are_found_in_a_folder_by_a_glob_or_alone(folder: str) -> None:
    assert storage.find(folder) == []
    assert storage.find(f"{folder}/*.txt") == []
    for name in ("b/deep/1.txt", "a.txt", "b/2.md", ".hidden", "b/.git/x"):
        storage.write_bytes(storage.join(folder, name), b"x" * len(name))
    found = storage.find(folder)
    assert [(file.name, file.bytes) for file in found] == [("a.txt", 5), ("b/2.md", 6), ("b/deep/1.txt", 12)]
    assert [storage.read_bytes(file.uri) for file in found] == [b"x" * 5, b"x" * 6, b"x" * 12]
    assert storage.find(folder + "/") == found
    assert [file.name for file in storage.find(f"{folder}/b/*")] == ["2.md"]
    assert [file.name for file in storage.find(f"{folder}/**/*.txt")] == ["a.txt", "b/deep/1.txt"]
    assert [file.name for file in storage.find(f"{folder}/b/deep/1.txt")] == ["1.txt"]
    storage.write_bytes(storage.join(folder, "a.txt"), b"yyyyy")
    changed = {file.name: file.version for file in storage.find(folder)}
    assert [file.name for file in found if changed[file.name] != file.version] == ["a.txt"]


def test_a_directory_is_valid_once_its_marker_is_written(folder: str) -> None:
    storage.make_directory(folder)
    storage.make_directory(folder)
    storage.write_bytes(storage.join(folder, "data"), b"x")
    assert not storage.is_committed(folder)
    storage.commit(folder, {"step": 3})
    assert storage.is_committed(folder)
    assert storage.read_commit(folder)["step"] == 3
    storage.commit(folder)
    assert list(storage.read_commit(folder)) == ["files"]


def test_a_tree_is_removed_whole_and_nothing_beside_it(folder: str) -> None:
    for name in ("run/a", "run/deep/b", "run-2/a"):
        storage.write_bytes(storage.join(folder, name), b"x")
    storage.commit(storage.join(folder, "run"))
    storage.remove_tree(storage.join(folder, "run"))
    assert storage.find(storage.join(folder, "run")) == []
    assert [file.name for file in storage.find(folder)] == ["run-2/a"]
    # An empty directory means nothing in an object store: some keep it for a while.
    assert folder.startswith("s3://") or storage.list_names(folder) == ["run-2"]


def test_a_removal_that_breaks_off_leaves_no_valid_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path)
    storage.write_bytes(storage.join(folder, "data"), b"x")
    storage.commit(folder)

    def power_cut(self: object, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "rm", power_cut)
        with pytest.raises(StorageError, match="gone"):
            storage.remove_tree(folder)
    assert storage.list_names(folder) == ["data"]
    assert not storage.is_committed(folder)


def test_a_digest_is_sha256_over_all_blocks(folder: str) -> None:
    content = bytes(range(256)) * 5000  # 1.28 MB: more than one block
    uri = storage.join(folder, "large")
    storage.write_bytes(uri, content)
    assert storage.digest(uri) == hashlib.sha256(content).hexdigest()


def test_what_another_client_writes_or_removes_is_seen_at_once(folder: str) -> None:
    """A listing kept from before must not hide a checkpoint that another host has committed, or show one removed."""
    storage.write_bytes(storage.join(folder, "first"), b"x")
    assert storage.list_names(folder) == ["first"]
    fs, path = url_to_fs(folder, skip_instance_cache=True)
    fs.pipe_file(f"{path}/second", b"xy")
    assert storage.exists(storage.join(folder, "second"))
    assert storage.list_names(folder) == ["first", "second"]
    fs.rm_file(f"{path}/first")
    assert not storage.exists(storage.join(folder, "first"))
    fs.pipe_file(f"{path}/second", b"longer")
    assert storage.read_bytes(storage.join(folder, "second")) == b"longer"


def test_a_write_that_fails_keeps_the_old_content_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "state.json")
    storage.write_bytes(uri, b"old")

    def power_cut(source: str, target: str) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", power_cut)
        with pytest.raises(StorageError):
            storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(str(tmp_path)) == ["state.json"]


def test_threads_that_write_one_file_never_show_a_part_of_it(tmp_path: Path) -> None:
    uri = str(tmp_path / "state")
    contents = [bytes([65 + i]) * 50_000 for i in range(4)]
    storage.write_bytes(uri, contents[0])
    failures: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(10):
                storage.write_bytes(uri, content)
                assert storage.read_bytes(uri) in contents
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert os.listdir(tmp_path) == ["state"]


def test_an_object_store_that_refuses_is_told_in_our_words(s3: str) -> None:
    with pytest.raises(MissingFileError, match="no-such-bucket"):
        storage.write_bytes("s3://no-such-bucket-here/x", b"x")
    with pytest.raises(MissingFileError):
        storage.read_bytes(f"{s3}/nothing")


def test_an_object_store_that_is_not_there_is_the_worlds_fault() -> None:
    """In a process of its own: a client keeps the address that it was made with."""
    program = (
        "from base import storage, errors\n"
        "def main(): storage.exists('s3://bucket/key')\n"
        "raise SystemExit(errors.run_program(main))"
    )
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == StorageError.exit_code, ended.stderr
    assert ended.stderr.startswith("error: storage failed at s3://bucket/key: ")


def test_an_unknown_kind_of_storage_is_the_callers_fault() -> None:
    with pytest.raises(ConfigError, match="nonsense://x"):
        storage.exists("nonsense://x")


def test_a_uri_with_a_password_is_refused_before_anything_is_asked() -> None:
    for use in (storage.exists, storage.read_bytes, storage.list_names, storage.make_directory):
        with pytest.raises(ConfigError, match=r"^s3://\*\*\*@bucket/x: a URI must not hold a password"):
            use("s3://AKIA:hunter2@bucket/x")


def test_uris_are_joined_with_one_slash() -> None:
    assert storage.join("s3://b/", "/a/", "c") == "s3://b/a/c"
    assert storage.join("/x", "y") == "/x/y"
    assert storage.is_local("/x")
    assert storage.is_local("file:///x")
    assert not storage.is_local("s3://b")
    assert not storage.is_local("memory://b")
    assert storage.local_path("file:///x/y") == "/x/y"
    assert storage.local_path("~/x") == os.path.expanduser("~/x")


def test_a_fingerprint_depends_on_the_value_alone() -> None:
    one = storage.fingerprint({"a": 1, "b": [1.5, None, "ü"]})
    assert one == storage.fingerprint({"b": [1.5, None, "ü"], "a": 1})
    assert len({one, storage.fingerprint({"a": 1, "b": [1.5, "ü", None]}), storage.fingerprint({"a": 1})}) == 3
    assert storage.fingerprint({}) == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("name", ["[v2]", "wh?t", "s*r", "a::b", "a b #2"])
def test_a_path_that_is_there_is_meant_as_it_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / "v").mkdir()
    for file in (tmp_path / name / "1.txt", tmp_path / name / "sub" / "2.txt", tmp_path / "v" / "3.txt"):
        file.write_text("x")
    found = [[file.name for file in storage.find(f"{tmp_path}/{name}{rest}")] for rest in ("", "/*.txt", "/**/*.txt")]
    assert found == [["1.txt", "sub/2.txt"], ["1.txt"], ["1.txt", "sub/2.txt"]]
    assert storage.read_bytes(f"{tmp_path}/{name}/1.txt") == b"x"


def test_a_marker_names_the_files_that_were_committed(folder: str) -> None:
    for name, size in {"a": 3, "deep/b": 5, ".metadata": 7}.items():
        storage.write_bytes(storage.join(folder, name), b"x" * size)
    storage.commit(folder)
    sizes = {name: state[0] for name, state in storage.read_commit(folder)["files"].items()}
    assert sizes == {"a": 3, "deep/b": 5, ".metadata": 7}
    assert not storage.damage(folder)
    storage.write_bytes(storage.join(folder, "later"), b"a report")  # what comes after is no damage
    assert not storage.damage(folder)


def test_damage_is_what_is_missing_and_what_has_another_size(folder: str) -> None:
    assert storage.damage(folder).missing == [storage.MARKER]
    for name in ("a", "b", "c"):
        storage.write_bytes(storage.join(folder, name), b"12345")
    storage.commit(folder)
    storage.remove_tree(storage.join(folder, "a"))
    storage.write_bytes(storage.join(folder, "c"), b"1234")
    found = storage.damage(folder)
    assert (found.missing, found.changed) == (["a"], ["c"])
    assert str(found) == "missing: a; changed: c"
    storage.uncommit(folder)
    assert storage.damage(folder).missing == [storage.MARKER]


def test_small_files_of_a_local_disk_are_compared_by_content(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/config.json", b"12345")
    storage.commit(str(tmp_path))
    storage.write_bytes(f"{tmp_path}/config.json", b"54321")
    assert storage.damage(str(tmp_path)).changed == ["config.json"]


def test_a_marker_of_an_earlier_version_counts_as_whole(folder: str) -> None:
    storage.write_bytes(storage.join(folder, "a"), b"12345")
    for record in ({"step": 3}, {"dtype": "bfloat16", "files": 2}):
        storage.write_json(storage.join(folder, storage.MARKER), record)
        assert storage.is_committed(folder)
        assert not storage.damage(folder)


@pytest.mark.parametrize("content", [b"", b'{"digest": "12', b"[]", b"\0\0\0\0"])
def test_an_empty_or_cut_marker_does_not_count(folder: str, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    storage.write_bytes(storage.join(folder, storage.MARKER), content)
    assert not storage.is_committed(folder)
    assert "empty or cut short" in caplog.text
    assert storage.damage(folder).missing == [storage.MARKER]
    with pytest.raises(MissingFileError, match="no finished output"):
        storage.read_commit(folder)


def test_a_link_in_place_of_a_folder_is_written_through(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    link.symlink_to(disk)
    storage.make_directory(str(link))
    assert disk.is_dir()
    (disk / "deep").mkdir()
    (disk / "deep" / "a").write_text("x")
    (disk / "to").symlink_to(tmp_path)
    storage.commit(str(link))
    storage.remove_tree(str(link))
    assert link.is_symlink()
    assert list(disk.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_the_names_of_committed_files_are_on_disk_before_and_after_the_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may take back names that no fsync of their folder has kept."""
    folder, synced = tmp_path / "step_4", []
    storage.write_bytes(str(folder / "shard"), b"weights")
    fsync = os.fsync

    def observed(descriptor: int) -> None:
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            synced.append((path, (folder / storage.MARKER).exists()))

    monkeypatch.setattr(os, "fsync", observed)
    storage.commit(str(folder))
    folders = (str(folder), str(tmp_path))
    assert synced == [(path, committed) for committed in (False, True) for path in folders]


def test_only_a_local_path_can_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert storage.is_link(str(tmp_path / "link"))
    assert not storage.is_link(str(tmp_path))
    assert not storage.is_link("memory://link")
