"""The `cherry` command's arguments, what it answers without a server, and what it must not import for that."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import click
import psutil
import pytest
import torch

from base import storage
from base.errors import ConfigError, DataError, MissingFileError, ServiceError
from flows.cli import cli
from model.model_config import PRESETS, ModelConfig
from model.weights.hf_config import hf_config
from model.weights.safetensors_file import write_file

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs" / "tiny.yaml")
LARGE = str(ROOT / "configs" / "671b.yaml")
CLUSTER = str(ROOT / "configs" / "clusters" / "h100-256.yaml")


def parse(name, *words):
    """The values that a subcommand is called with."""
    parent = click.Context(cli, **cli.context_settings)
    return cli.commands[name].make_context(name, list(words), parent=parent).params


def test_a_run_takes_a_config_and_dotted_overrides():
    expected = {"config": "a.yaml", "overrides": ("train.steps=3", "name=b"), "verbose": True, "dry_run": False}
    assert parse("run", "a.yaml", "train.steps=3", "name=b", "--verbose") == expected


def test_a_release_takes_a_version():
    expected = {"config": "a.yaml", "overrides": ("name=b",), "model_version": 3, "verbose": False}
    assert parse("deploy", "a.yaml", "name=b", "--model-version", "3") == expected
    assert parse("deploy", "a.yaml")["model_version"] is None


@pytest.mark.parametrize(
    "words",
    [
        ("a.yaml", "name=b", "train.steps=1", "--model-version", "2", "--verbose"),
        ("a.yaml", "name=b", "--model-version", "2", "--verbose", "train.steps=1"),
        ("--verbose", "a.yaml", "name=b", "--model-version=2", "train.steps=1"),
        ("--model_version", "2", "a.yaml", "--verbose", "name=b", "train.steps=1"),
    ],
)
def test_overrides_stand_anywhere_among_the_options(words):
    expected = {"config": "a.yaml", "overrides": ("name=b", "train.steps=1"), "model_version": 2, "verbose": True}
    assert parse("deploy", *words) == expected


def options():
    return [
        (command, option)
        for command in cli.commands.values()
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--")
    ]


def test_every_option_is_known_with_dashes_and_with_underscores_and_shown_with_dashes():
    assert len(options()) > 10
    parent = click.Context(cli, **cli.context_settings)
    for command, option in options():
        assert "_" not in option
        parser = command.make_parser(click.Context(command, parent=parent))
        for written in (option, "--" + option[2:].replace("-", "_")):
            _, _, order = parser.parse_args([written, "x"])
            assert [parameter for parameter in order if option in parameter.opts], written


def test_every_option_reaches_its_subcommand():
    for command in cli.commands.values():
        function = ast.parse(inspect.getsource(command.callback)).body[0]
        read = {node.id for line in function.body for node in ast.walk(line) if isinstance(node, ast.Name)}
        taken = {parameter.name for parameter in command.params}
        if (rest := function.args.kwarg) is not None and rest.arg in read:  # all that have no name of their own
            taken &= {argument.arg for argument in function.args.kwonlyargs}
        assert taken <= read, command.name


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["fly"], ["deploy", "a.yaml", "--model-version", "newest"], ["run", "a.yaml", "--fast"]]
)
def test_a_command_that_is_no_command_ends_as_other_wrong_flags_do(arguments, capsys, code):
    assert code(*arguments) == ConfigError.exit_code
    assert "Usage: cherry" in capsys.readouterr().err


def test_the_error_of_an_override_written_as_a_flag_says_how_to_write_it(capsys, code):
    assert code("run", "a.yaml", "--train.steps=3", "name=b") == ConfigError.exit_code
    error = capsys.readouterr().err
    assert "--train.steps" in error
    assert "Keys of the config have no dashes: train.steps=3\n" in error


def test_a_shell_completes_subcommands_and_options(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_CHERRY_COMPLETE": "bash_complete"}
    for words, index, expected in (("cherry pl", 1, "plan"), ("cherry plan --clu", 2, "--cluster")):
        given = {"COMP_WORDS": words, "COMP_CWORD": str(index)}
        command = [sys.executable, "-m", "flows.cli"]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment | given, check=False)
        assert ended.stdout.split(",")[-1].strip() == expected


@pytest.mark.parametrize("command", ["status", "stop", "doctor"])
def test_the_runs_directory_is_explained(command, capsys, code):
    assert code(command, "--help") == 0
    assert "--runs-directory DIR Directory of the runs. [default: runs]" in " ".join(capsys.readouterr().out.split())


def test_only_the_config_is_required(capsys, code):
    assert code("run") == ConfigError.exit_code
    assert "Missing argument 'CONFIG'" in capsys.readouterr().err


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
def test_a_mistake_is_an_error_before_a_flow_exists(
    command, arguments, error, text, tmp_path, monkeypatch, capsys, code
):
    monkeypatch.chdir(tmp_path)
    assert code(command, *arguments) == error.exit_code
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert text in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["run", "deploy"])
def test_a_tracking_server_that_is_away_is_told_before_anything_starts(command, tmp_path, monkeypatch, capsys, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:9")  # nothing listens there
    before = psutil.Process().children()
    assert code(command, TINY, "serve.port=0") == ServiceError.exit_code
    printed = capsys.readouterr().err
    assert printed.startswith("error: no MLflow server answers at http://***@127.0.0.1:9 (")
    assert "MLFLOW_TRACKING_URI" in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().children() == before


def test_weights_are_quantized_by_the_program_that_takes_the_command_s_place(tmp_path):
    source, name = str(tmp_path / "source"), "model.layers.0.self_attn.o_proj.weight"
    write_file(storage.join(source, "model.safetensors"), {name: torch.ones(4, 8)})
    storage.write_json(storage.join(source, "config.json"), hf_config(ModelConfig(**PRESETS["tiny"])))
    command = [sys.executable, "-m", "flows.cli", "quantize", source, str(tmp_path / "quantized"), "--workers", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "100% quantized" in ended.stdout
    assert storage.is_committed(str(tmp_path / "quantized"))
    command += ["--format", "w4a16", "--method", "gptq", "--calibration", str(tmp_path / "no data")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == DataError.exit_code, ended.stderr
    assert "has no tokenizer.json" in ended.stderr
    command[4:] = [str(tmp_path / "nowhere"), str(tmp_path / "quantized")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == MissingFileError.exit_code
    assert ended.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    "options",
    [("--format", "int3"), ("--workers", "0"), ("--method", "round"), ("--calibration-tokens", "0")],
)
def test_what_quantize_cannot_do_is_refused(options, capsys, code):
    assert code("quantize", "a", "b", *options) == ConfigError.exit_code
    assert options[1] in capsys.readouterr().err


def test_nothing_to_show_and_nothing_to_stop(tmp_path, capsys, code):
    for command, text in (("status", f"no runs in {tmp_path}"), ("stop", "nothing was being served")):
        assert code(command, "--runs-directory", str(tmp_path)) == 0
        assert text in capsys.readouterr().out.replace("\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["--version"],
        ["--help"],
        ["run", "--help"],
        ["status", "--runs-directory", "none"],
        ["plan", LARGE, "--cluster", CLUSTER, "--search"],
        ["plan", TINY, "--cluster", "local", "--json"],
    ],
)
def test_a_question_is_answered_without_torch_or_mlflow(command, tmp_path):
    program = (
        "import sys\nfrom flows.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "heavy = {'torch', 'mlflow'} & set(sys.modules)\n"
        "if '--help' in sys.argv:\n    heavy |= {'prefect', 'pydantic', 'rich', 'asyncio'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    ended = subprocess.run(
        [sys.executable, "-c", program, *command],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout
