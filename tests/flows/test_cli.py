"""The `cherry` command's arguments, what it answers without a server, and what it must not import for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from base.errors import ConfigError, MissingFileError
from flows.cli import main, parse

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs" / "tiny.yaml")


def code(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_a_run_takes_a_config_and_dotted_overrides():
    options = parse(["run", "a.yaml", "train.steps=3", "name=b", "--verbose"])
    assert (options.config, options.overrides, options.verbose) == ("a.yaml", ["train.steps=3", "name=b"], True)


def test_a_release_takes_a_version():
    options = parse(["deploy", "a.yaml", "name=b", "--model-version", "3"])
    assert (options.model_version, options.overrides) == (3, ["name=b"])
    options = parse(["deploy", "a.yaml", "name=b", "--model-version", "2", "--verbose", "train.steps=1"])
    assert (options.model_version, options.verbose, options.overrides) == (2, True, ["name=b", "train.steps=1"])
    assert parse(["deploy", "a.yaml"]).model_version is None


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["fly"], ["deploy", "a.yaml", "--model-version", "newest"], ["run", "a.yaml", "--fast"]]
)
def test_a_command_that_is_no_command_ends_with_the_shells_code(arguments, capsys):
    assert code(*arguments) == 2
    assert "usage: cherry" in capsys.readouterr().err


def test_an_override_that_is_written_like_a_flag_is_told_how_to_write_it(capsys):
    assert code("run", "a.yaml", "--train.steps=3", "name=b") == 2
    assert "--train.steps=3 name=b. Keys of the config have no dashes: train.steps=3\n" in capsys.readouterr().err


def test_only_the_config_is_required(capsys):
    assert code("run") == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: CONFIG\n")


@pytest.mark.parametrize("command", ["run", "deploy"])
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((TINY, "train.learning_rte=1"), ConfigError, "train.learning_rte: unknown key, did you mean learning_rate?"),
        ((TINY, "train.steps"), ConfigError, "train.steps"),
        ((TINY, "runs_directory=s3://bucket/runs"), ConfigError, "runs_directory: must be a local"),
        (("configs/tinny.yaml",), MissingFileError, "configs/tinny.yaml"),
    ],
)
def test_a_mistake_is_told_before_a_flow_exists(command, arguments, error, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert code(command, *arguments) == error.exit_code
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert text in told
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_show_and_nothing_to_stop(tmp_path, capsys):
    for command, text in (("status", f"no runs in {tmp_path}"), ("stop", "nothing was being served")):
        assert code(command, "--runs-directory", str(tmp_path)) == 0
        assert text in capsys.readouterr().out.replace("\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["--version"], ["run", "--help"], ["status", "--runs-directory", "none"]])
def test_a_question_is_answered_without_torch_or_mlflow(command, tmp_path):
    program = (
        "import sys\nfrom flows.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "heavy = {'torch', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    ended = subprocess.run(
        [sys.executable, "-c", program, *command],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout
