"""The manifest: which shards count as finished, and what makes two targets the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from base import storage
from model.quantization.manifest import Manifest, describe_origin, difference, is_whole


def noted(target: str, *files: str) -> Manifest:
    """A manifest with finished shards."""
    manifest = Manifest(target)
    manifest.begin({"source": "here"})
    for file in files:
        data = file.encode() * 10
        storage.write_bytes(storage.join(target, file), data)
        manifest.add({"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    return manifest


@pytest.mark.parametrize("scheme", ["", "memory://manifest"])
def test_shards_that_are_as_they_were_noted_are_finished(scheme: str, tmp_path: Path) -> None:
    target = storage.join(scheme or str(tmp_path), "target")
    manifest = noted(target, "a", "b", "c", "d")
    manifest.add({"file": "e", "bytes": 0, "sha256": None})  # no file is written for it
    storage.write_bytes(storage.join(target, "b"), b"shorter")
    storage.remove_tree(storage.join(target, "c"))
    storage.write_bytes(storage.join(target, "manifest", "d.json"), b'{"file": "d", "by')  # cut short
    checked: list[int] = []
    assert set(manifest.finished("abcdef", 2, checked.append)) == {"a", "e"}
    assert len(checked) == 5
    assert manifest.origin() == {"source": "here"}
    manifest.remove()
    assert manifest.origin() is None
    assert manifest.finished("abcdef", 2) == {}


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    manifest = noted(str(tmp_path), "a")
    (tmp_path / "a").write_bytes(b"x" * 10)
    assert manifest.finished("a", 1) == {}


def test_a_file_that_is_not_there_is_not_whole(tmp_path: Path) -> None:
    assert not is_whole(str(tmp_path / "a"), {"bytes": 3, "sha256": "ab"}, None)


def test_origins_differ_by_source_files_format_and_code(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.safetensors").write_bytes(b"1")
    (source / "README.md").write_text("not read")
    origin = describe_origin(str(source), "one", {"bits": 8})
    assert list(origin["files"]) == ["a.safetensors"]
    assert difference(origin, describe_origin(f"{source}/", "one", {"bits": 8})) is None
    other = describe_origin(str(source), "two", {"bits": 4})
    assert difference(origin, other) == "another format (two)"
    (source / "a.safetensors").unlink()
    (source / "a.safetensors").write_bytes(b"2")
    again = describe_origin(str(source), "one", {"bits": 8})
    assert difference(again, origin) == "other files of the source"
    assert difference(origin, {**origin, "code": ["x", "y"]}) == "another version of the code"
    assert difference(origin, {}) is not None


def test_origins_differ_by_the_calibration(tmp_path: Path) -> None:
    def origin(**calibration: object) -> dict[str, object]:
        return describe_origin(str(tmp_path), "one", {}, calibration or None)

    plain, found = origin(), {"method": ["gptq", "ab"], "tokens": "cd", "calibration_code": ["ef", "1"]}
    calibrated = origin(**found)
    assert difference(calibrated, origin(**found)) is None
    assert difference(calibrated, origin(**{**found, "tokens": "xy"})) == "other calibration tokens"
    assert (
        difference(calibrated, origin(**{**found, "method": ["awq", "ab"], "tokens": "xy"})) == "another method (awq)"
    )
    changed = origin(**{**found, "calibration_code": ["xy", "1"]})
    assert difference(calibrated, changed) == "another version of the calibration's code"
    assert difference(calibrated, plain) == "another method (nearest)"
    assert difference(plain, calibrated) == "another method (gptq)"
