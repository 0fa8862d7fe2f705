"""Outputs as files: paths that move with the run, damage, and folders that are set aside, links too."""

from __future__ import annotations

from pathlib import Path

import pytest

from base import storage
from tasks.files.outputs import clear_damage, damages, file_states, found_paths, set_aside, stored_paths


def fill(folder: Path, text: str = "weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(text)
    (folder / "config.json").write_text("{}")
    storage.commit(str(folder))
    return folder


def test_paths_in_the_run_directory_move_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = {
        "export": str(tmp_path / "runs" / "one" / "export"),
        "result": "runs/one/train/result.json",
        "checkpoint": "s3://bucket/one/step_4",
        "elsewhere": str(tmp_path / "runs" / "one-more" / "x"),
    }
    stored = stored_paths(Path("runs/one"), outputs)
    assert found_paths(Path("/moved/one"), stored) == {
        "export": "/moved/one/export",
        "result": "/moved/one/train/result.json",
        "checkpoint": "s3://bucket/one/step_4",
        "elsewhere": str(tmp_path / "runs" / "one-more" / "x"),
    }
    assert found_paths(Path("/moved/one"), outputs) == outputs  # a record of an earlier version


def test_files_and_folders_are_damaged_when_they_are_not_as_they_were(tmp_path: Path) -> None:
    folder, file = fill(tmp_path / "export"), tmp_path / "result.json"
    file.write_text('{"loss": 1.5}')
    outputs = {"export": str(folder), "result": str(file)}
    states = file_states(outputs)
    assert list(states) == ["result"]
    assert damages(outputs, states) == {}
    file.write_text("")
    (folder / "model.safetensors").unlink()
    found = damages(outputs, states)
    assert found[str(folder)].missing == ["model.safetensors"]
    assert found[str(file)].changed == [""]
    assert list(damages(outputs, {})) == [str(folder)]  # an earlier version did not record a file's state
    file.unlink()
    assert set(damages(outputs, {})) == set(outputs.values())


def test_a_folder_that_lost_files_stays_in_place_and_a_changed_one_is_kept_beside_it(tmp_path: Path) -> None:
    lost, changed = fill(tmp_path / "lost"), fill(tmp_path / "changed")
    (lost / "model.safetensors").unlink()
    (changed / "config.json").write_text('{"edited": true}')
    assert clear_damage(str(lost), storage.damage(str(lost))) is None
    assert not storage.is_committed(str(lost))
    assert (lost / "config.json").exists()
    kept = clear_damage(str(changed), storage.damage(str(changed)))
    assert kept == tmp_path / "changed.damaged"
    assert (kept / "config.json").read_text() == '{"edited": true}'
    assert not changed.exists()


def test_nothing_that_was_set_aside_is_replaced(tmp_path: Path) -> None:
    for text in "abc":
        set_aside(fill(tmp_path / "export", text), "export.12345678")
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["export.12345678", "export.12345678.2", "export.12345678.3"]
    assert [(tmp_path / name / "model.safetensors").read_text() for name in kept] == ["a", "b", "c"]


def test_a_link_in_place_of_a_folder_stays_and_what_it_points_at_is_kept(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    real = fill(disk / "export")
    (run / "export").symlink_to(real)
    aside = set_aside(run / "export", "export.12345678")
    assert (run / "export").is_symlink()
    assert list((run / "export").iterdir()) == []
    assert (run / "export").resolve() == real
    assert aside.resolve() == disk / "export.12345678"
    assert (aside / "model.safetensors").read_text() == "weights"
    assert storage.damage(str(aside)) == storage.Damage([], [])
