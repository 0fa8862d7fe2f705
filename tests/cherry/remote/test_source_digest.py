"""Digest of source files: it changes with a name and with a content, and not with what is left out."""

from cherry.remote.source_digest import source_digest, source_files


def test_a_digest_depends_on_names_and_contents_of_python_files_alone(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("1\n")
    (tmp_path / "b.py").write_text("2\n")
    (tmp_path / "notes.txt").write_text("3\n")
    found = source_digest(tmp_path, ["room", "b.py", "notes.txt", "gone"])
    assert source_files(tmp_path, ["room", "b.py", "!room/a.py"]) == {tmp_path / "b.py"}
    (tmp_path / "notes.md").write_text("4\n")
    assert source_digest(tmp_path, ["b.py", "room", "notes.txt"]) == source_digest(
        tmp_path, ["room", "b.py", "notes.txt"]
    )
    (tmp_path / "room" / "a.py").rename(tmp_path / "room" / "c.py")
    renamed = source_digest(tmp_path, ["room", "b.py"])
    assert renamed != found
    (tmp_path / "room" / "c.py").write_text("10\n")
    assert source_digest(tmp_path, ["room", "b.py"]) != renamed
    assert source_digest(tmp_path, ["b.py", "!room"]) == source_digest(tmp_path, ["b.py"])
