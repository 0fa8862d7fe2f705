"""MLflow's SQLite database: one that cannot be used is known at once, and a copy has its artifacts beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from base.errors import StorageError
from tasks.code_version import CodeVersion
from tasks.run_config import TrackingConfig
from tasks.tracking.mlflow_database import check_database, database_file
from tasks.tracking.mlflow_tracker import MlflowTracker
from tests.stranger import UID, run_as_stranger

CODE = CodeVersion("9.9", "d" * 64, None)
READ_ONLY = """
import sys
from pathlib import Path
from base.errors import StorageError
from tasks.tracking.mlflow_database import check_database
try:
    check_database(Path(sys.argv[1]) / "mlflow.db")
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:////a/b.db", Path("/a/b.db")),
        ("sqlite:///b.db", Path("b.db").absolute()),
        ("sqlite:////a/b.db?timeout=3", Path("/a/b.db")),
        ("sqlite:///:memory:", None),
        ("postgresql://host/name", None),
        ("http://host:5000", None),
    ],
)
def test_the_file_of_a_uri(uri: str, file: Path | None) -> None:
    assert database_file(uri) == file


def test_a_file_that_is_no_database_and_a_folder_that_is_a_file_are_told(tmp_path: Path) -> None:
    broken = tmp_path / "mlflow.db"
    broken.write_bytes(b"no database" * 100)
    with pytest.raises(StorageError, match=r"mlflow.db cannot be read: file is not a database\. Put a copy of it back"):
        check_database(broken)
    with pytest.raises(StorageError, match=r"cannot be written: .* runs_directory=PATH"):
        check_database(broken / "mlflow.db")
    check_database(tmp_path / "new" / "mlflow.db")  # MLflow makes it


@pytest.mark.slow
def test_a_read_only_file_system_is_told_at_once(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare is not installed")
    script = f'mount -t tmpfs -o ro none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    done = subprocess.run(
        [unshare, "--mount", "sh", "-c", script, READ_ONLY], capture_output=True, text=True, check=False, timeout=120
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.stdout.startswith(f"the folder {tmp_path} cannot be written: Read-only file system. Make it writable")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("place", ["mlflow.db", "mlartifacts"])
def test_a_database_or_a_folder_of_artifacts_of_somebody_else_is_told(tmp_path: Path, place: str) -> None:
    os.chown(tmp_path, UID, UID)
    (tmp_path / "mlartifacts").mkdir() if place == "mlartifacts" else (tmp_path / place).touch()
    done = run_as_stranger([sys.executable, "-c", READ_ONLY, str(tmp_path)], folder=tmp_path)
    assert done.stdout.startswith(
        f"{tmp_path / place} cannot be written: it is root's, and this process is uid {UID}'s"
    )
    assert "runs_directory=PATH" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("original_stays", [False, True])
def test_artifacts_of_a_moved_runs_directory_go_beside_the_database_in_use(
    tracker: MlflowTracker, tmp_path: Path, original_stays: bool
) -> None:
    plot = tmp_path / "plot.png"
    plot.write_bytes(b"picture")
    at, moved = tmp_path / "runs", tmp_path / "moved"
    first = MlflowTracker(TrackingConfig(uri=f"sqlite:///{at}/mlflow.db"), str(at), CODE)
    old = first.runs.start("old", parent=None, step="flow", identity="1", run_key="k")
    first.runs.artifact(old, plot)
    shutil.copytree(at, moved)
    if not original_stays:
        at.rename(tmp_path / "runs.bak")
    second = MlflowTracker(TrackingConfig(uri=f"sqlite:///{moved}/mlflow.db"), str(moved), CODE)
    new = second.runs.start("new", parent=None, step="flow", identity="2", run_key="k")
    second.runs.artifact(new, plot)
    client = second._connection.get()[0]
    for run_id in (old, new):
        assert [one.path for one in client.list_artifacts(str(run_id))] == ["plot.png"]
    written = {path.relative_to(moved / "mlartifacts").parts[0] for path in moved.rglob("plot.png")}
    assert written == {old, new}
    assert at.exists() == original_stays
    if original_stays:
        assert [path.parts[-3] for path in at.rglob("plot.png")] == [old], "the original is left as it is"


FIRST_RUN = """
import sys
from tasks.code_version import CodeVersion
from tasks.run_config import TrackingConfig
from tasks.tracking.mlflow_tracker import MlflowTracker
tracker = MlflowTracker(TrackingConfig(), sys.argv[1], CodeVersion("9.9", "d" * 64, None))
tracker.open(print)
print(tracker.runs.start(sys.argv[2], parent=None, step="flow", identity=sys.argv[2], run_key="k"))
"""


@pytest.mark.slow
def test_two_first_runs_at_once_are_both_recorded(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_RUN, str(tmp_path), name],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    for out, _ in ended:
        assert len(out.strip()) == 32, ended
