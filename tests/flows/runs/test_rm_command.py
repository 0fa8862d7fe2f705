"""`cherry rm`: what it lists, what it refuses, and that it removes the run and nothing else."""

import io

import psutil
import pytest

from base.errors import InvalidInputError, MissingFileError, OperationalError
from cherry.cluster import ClusterSpec
from flows.runs.rm_command import remove
from tasks.providers.protocol import write_reservation
from tasks.providers.registry import reserve
from tasks.run_config import TrackingConfig
from tasks.tracking.connect import connect


@pytest.fixture
def registered(make_run, tmp_path):
    """A run with a registered version."""
    run = make_run("tiny").finish_all()
    (run.directory / "export").mkdir()
    (run.directory / "export" / "model.safetensors").write_bytes(b"x" * 5000)
    registry = connect(TrackingConfig(uri="json:"), str(tmp_path / "runs")).registry
    uri = str(run.directory / "export")
    version = registry.register(None, "small", uri, identity="i", alias="candidate", tags={})
    run.register("small", version.version)
    return run, registry


def left(tmp_path):
    return sorted(path.name for path in (tmp_path / "runs").iterdir() if path.name != "tracking")


def test_the_list_is_shown_and_nothing_goes_without_a_yes(registered, tmp_path):
    shown = []
    removed = remove(tmp_path / "runs", "tiny", force=False, confirm=lambda lines: bool(shown.extend(lines)))
    assert removed is None
    text = "\n".join(shown)
    assert "4.9 KiB  export" in text
    assert "small v1 refers to it, and will have no weights." in text
    assert "Its runs in the tracker stay." in text
    assert left(tmp_path) == ["tiny"]


def test_a_run_is_removed_with_nothing_left_and_the_version_stays(registered, make_run, tmp_path, capsys, code):
    make_run("other")
    assert code("rm", "tiny", "--yes", "--runs-directory", str(tmp_path / "runs")) == 0
    assert f"removed {tmp_path / 'runs' / 'tiny'}" in capsys.readouterr().out
    assert left(tmp_path) == ["other"]
    assert registered[1].version("small", number=1) is not None
    assert code("rm", "tiny", "--yes", "--runs-directory", str(tmp_path / "runs")) == MissingFileError.exit_code


def test_hosts_that_it_holds_are_given_back_first_and_a_run_whose_hosts_cannot_be_stays(registered, make_run, tmp_path):
    for name, provider in (("tiny", "local"), ("other", "no-such")):
        directory = tmp_path / "runs" / name
        directory.mkdir(exist_ok=True)
        asked = reserve("local", ClusterSpec(kind="local"), str(directory), name, nodes=1, ranks_per_node=1)
        write_reservation(directory, asked.model_copy(update={"provider": provider}))
    make_run("third")
    (tmp_path / "runs" / "third" / "config.yaml").rename(tmp_path / "runs" / "other" / "config.yaml")
    assert remove(tmp_path / "runs", "tiny", force=False, confirm=lambda _: True) is not None
    with pytest.raises(OperationalError, match="its hosts were not given back"):
        remove(tmp_path / "runs", "other", force=False, confirm=lambda _: True)
    assert left(tmp_path) == ["other", "third"]


def test_without_a_terminal_to_ask_nothing_is_removed(registered, tmp_path, monkeypatch, capsys, code):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert code("rm", "tiny", "--runs-directory", str(tmp_path / "runs")) != 0
    assert left(tmp_path) == ["tiny"]


def test_a_champion_is_kept_unless_forced(registered, tmp_path):
    run, registry = registered
    registry.set_alias("small", "champion", 1)
    with pytest.raises(InvalidInputError, match=r"small v1 is the champion\. `cherry rm tiny --force`"):
        remove(tmp_path / "runs", "tiny", force=False, confirm=lambda _: True)
    assert run.directory.is_dir()
    assert remove(tmp_path / "runs", "tiny", force=True, confirm=lambda _: True) is not None
    assert left(tmp_path) == []


def test_an_older_version_of_a_moved_run_that_is_champion_keeps_it(registered, tmp_path):
    run, registry = registered
    mark = "a" * 64
    registry.annotate(registry.version("small", number=1), tags={"export_fingerprint": mark})
    registry.set_alias("small", "champion", 1)
    (run.directory / "export").rename(run.directory / f"export.{mark[:8]}")  # set aside for the newer version
    newer = registry.register(None, "small", str(run.directory / "export"), identity="j", alias="candidate", tags={})
    run.register("small", newer.version)
    (tmp_path / "runs").rename(tmp_path / "moved")
    with pytest.raises(InvalidInputError, match=r"small v1 is the champion"):
        remove(tmp_path / "moved", "tiny", force=False, confirm=lambda _: True)


def test_a_run_at_work_is_never_removed(registered, tmp_path):
    run, _ = registered
    run.hold(psutil.Process())
    with pytest.raises(InvalidInputError, match="is being worked on"):
        remove(tmp_path / "runs", "tiny", force=True, confirm=lambda _: True)
    assert run.directory.is_dir()


def test_a_link_is_refused_and_links_inside_are_not_followed(make_run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "tokens").write_text("kept")
    run = make_run("tiny")
    (run.directory / "data").symlink_to(data)
    (tmp_path / "runs" / "alias").symlink_to(run.directory)
    with pytest.raises(InvalidInputError, match="is a link to"):
        remove(tmp_path / "runs", "alias", force=True, confirm=lambda _: True)
    assert remove(tmp_path / "runs", "tiny", force=False, confirm=lambda _: True) is not None
    assert (data / "tokens").read_text() == "kept"
