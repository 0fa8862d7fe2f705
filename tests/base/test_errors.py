"""The error family: codes that tell the side across a process, and operating system errors turned into it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, model_serializer

from base import errors, storage
from base.errors import (
    ArgumentParser,
    CherryError,
    ConfigError,
    DiskFullError,
    InvalidInputError,
    MissingFileError,
    OperationalError,
    StorageError,
    SupersededError,
    directory_fault,
    is_retryable_exit_code,
    run_program,
    storage_errors,
)

ROOT = Path(__file__).parents[2]


def family() -> list[type[CherryError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, CherryError)]
    assert len(found) > 10
    return found


def test_exit_codes_are_unique_and_on_their_side() -> None:
    assert len({member.exit_code for member in family()}) == len(family())
    for member in family():
        if issubclass(member, InvalidInputError):
            assert 10 <= member.exit_code < 30
            assert issubclass(member, ValueError)
            assert not is_retryable_exit_code(member.exit_code)
        elif issubclass(member, OperationalError):
            assert 30 <= member.exit_code < 50
            assert not issubclass(member, ValueError)
            # Tried again, a superseded attempt would take the run back from the newer one.
            assert is_retryable_exit_code(member.exit_code) is (member is not SupersededError)
        else:
            assert member is CherryError


@pytest.mark.parametrize("code", [30, 49, 129, 128 + signal.SIGTERM, 128 + signal.SIGKILL, -signal.SIGKILL])
def test_the_worlds_side_and_signals_are_retried(code: int) -> None:
    assert is_retryable_exit_code(code)


@pytest.mark.parametrize("code", [0, 1, 2, 9, 10, 29, 50, 127, 128])
def test_success_the_callers_side_and_bugs_are_not_retried(code: int) -> None:
    assert not is_retryable_exit_code(code)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://AKIA1:se/cr+et@bucket/data", "s3://***@bucket/data"),
        ("https://user:secret@mlflow.example:5000/x", "https://***@mlflow.example:5000/x"),
        ("postgresql+psycopg2://:secret@host/db", "postgresql+psycopg2://***@host/db"),
        ("simplecache::s3://a:secret@bucket", "simplecache::s3://***@bucket"),
    ],
)
def test_a_password_in_a_uri_is_seen_and_not_shown(uri: str, shown: str) -> None:
    assert errors.has_credentials(uri)
    assert errors.without_credentials(f"reading {uri}: denied") == f"reading {shown}: denied"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a:b@c",
        "abfs://container@account.dfs.core.windows.net/x",
        "http://127.0.0.1:5000/a@b",
        "http://[::1]:5000",
        "sqlite:////runs/a:b@c/mlflow.db",
        "file:///a:b@c",
        "/a:b@c",
    ],
)
def test_a_uri_without_a_password_is_left_alone(uri: str) -> None:
    assert not errors.has_credentials(uri)
    assert errors.without_credentials(uri) == uri


def test_a_full_device_is_a_full_disk() -> None:
    with pytest.raises(DiskFullError, match="/dev/full") as caught, storage_errors("/dev/full"):
        Path("/dev/full").write_bytes(b"x")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_running_out_of_space_keeps_what_was_written_before(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64)
    target = str(disk / "state.json")
    storage.write_bytes(target, b"old")
    with pytest.raises(DiskFullError, match="Free some space"):
        storage.write_bytes(target, b"x" * 1_000_000)
    assert storage.read_bytes(target) == b"old"
    assert os.listdir(disk) == ["state.json"]


def test_other_system_errors_keep_their_side(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="none does not exist"), storage_errors("none"):
        (tmp_path / "none").read_bytes()
    with pytest.raises(StorageError, match="memory") as caught, storage_errors("memory"):
        Path("/proc/self/mem").read_bytes()
    assert not isinstance(caught.value, DiskFullError)


def test_what_the_same_path_meets_again_is_the_caller_s(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    meet: list[tuple[Callable[[], object], str]] = [
        (tmp_path.read_bytes, "a directory is there"),
        ((tmp_path / "file" / "inner").read_bytes, "a part of this path is a file"),
        ((tmp_path / "file").mkdir, "a file is there"),
        ((tmp_path / ("x" * 300)).read_bytes, "a name is longer"),
        ((tmp_path / "loop").read_bytes, "its links lead in a circle"),
    ]
    for call, words in meet:
        with pytest.raises(MissingFileError, match=f"place: {words}"), storage_errors("place"):
            call()


def test_a_directory_can_be_where_none_or_nothing_is_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path)
    for name in ("", "new/deep", "linked", "linked/new"):
        assert directory_fault(str(tmp_path / name)) is None
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    for name, words in (("file", "is a file"), ("file/new", "is a file"), ("gone/new", "link to what does not exist")):
        assert words in str(directory_fault(str(tmp_path / name)))
    for name in ("loop", "loop/new", "x" * 300, "null\0"):
        assert directory_fault(str(tmp_path / name)) is not None, name


def test_an_error_that_has_its_sentence_passes_through_unchanged() -> None:
    original = ConfigError("a: b")
    with pytest.raises(ConfigError) as caught, storage_errors("somewhere"):
        raise original
    assert caught.value is original


def test_a_program_tells_an_error_in_one_line_and_returns_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise DiskFullError("no space left")

    assert run_program(main) == DiskFullError.exit_code
    captured = capsys.readouterr()
    assert captured.err == "error: no space left\n"
    assert captured.out == ""


def test_a_program_that_ends_well_or_is_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_program(lambda: None) == 0
    assert run_program(interrupted) == 130
    assert capsys.readouterr().err == ""


def test_ctrl_c_that_a_library_made_another_exception_of_is_no_bug() -> None:
    class Interrupts:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    class Dumped(BaseModel):
        value: int

        @model_serializer(mode="wrap")
        def _dump(self, handler: Any) -> Any:
            raise KeyboardInterrupt

    class Iterated(BaseModel):
        values: list[int]

    def numbers() -> Iterator[int]:
        raise KeyboardInterrupt
        yield 1

    assert run_program(lambda: (Dumped(value=1).model_dump(), None)[1]) == 130
    assert run_program(lambda: (type("Made", (), {"attribute": Interrupts()}), None)[1]) == 130  # from 3.12 on as it is
    # pydantic keeps nothing of this one.
    unnamed = lambda: (Iterated.model_validate({"values": numbers()}), None)[1]  # noqa: E731
    assert run_program(unnamed, interrupted=lambda: True) == 130
    with pytest.raises(ValidationError):
        run_program(unnamed)


def test_the_code_crosses_a_process_and_a_bug_keeps_its_traceback() -> None:
    program = "from base.errors import *\ndef main(): raise {}\nraise SystemExit(run_program(main))"

    def code_of(error: str) -> tuple[int, str]:
        command = [sys.executable, "-c", program.format(error)]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        return ended.returncode, ended.stderr

    assert code_of("NonFiniteLossError('NaN at step 3')") == (16, "error: NaN at step 3\n")
    code, text = code_of("KeyError('oops')")
    assert code == 1
    assert text.startswith("Traceback")


def test_dashes_and_underscores_in_a_flag_are_the_same_and_values_are_left_alone() -> None:
    parser = ArgumentParser(prog="program")
    parser.add_argument("--run_dir")
    commands = parser.add_subparsers(dest="command")
    serve = commands.add_parser("serve")
    serve.add_argument("--key-file")
    serve.add_argument("--set", action="append")
    serve.add_argument("rest", nargs="*")
    for run_dir, key_file in (("--run_dir", "--key-file"), ("--run-dir", "--key_file")):
        words = [f"{run_dir}=a_b-c", "serve", key_file, "d_e-f", "--set", "x_y=z-w", "--", "--key_file"]
        found = parser.parse_args(words)
        assert (found.run_dir, found.key_file, found.set, found.rest) == ("a_b-c", "d_e-f", ["x_y=z-w"], ["--key_file"])
    with pytest.raises(ConfigError, match="unrecognized arguments: --run_dri=x"):
        parser.parse_args(["--run_dri=x"])
    assert "--run_dir" in parser.format_help()
    assert "--run-dir" not in parser.format_help()


def test_a_name_that_is_no_utf8_is_shown_and_not_a_traceback(capsys):
    assert run_program(lambda: print("run-\udcff")) == 0
    assert capsys.readouterr().out == "run-\\udcff\n"
