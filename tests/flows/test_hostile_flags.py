"""Command lines, overrides and config files of any content are accepted, or refused by a sentence that names the fault.

Nothing is started: a command that would start a flow ends where its Prefect server would.
"""

from __future__ import annotations

import io
import os
import random
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from base.config import Section, dump, load, validate
from base.errors import USER_EXIT_CODES, CherryError, ConfigError
from base.yaml_config import apply_overrides, parse_yaml, read_yaml
from cherry.cluster import ClusterSpec
from flows.cli import cli, main
from flows.prefect_server import TemporaryServer
from tasks.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CLUSTERS = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))
STARTED = 77
"""Exit code of a command that would start a flow."""
# What YAML, JSON, Python's numbers, file systems and terminals each take in their own way.
VALUES = (
    """
0|1|-1|1e999|1e-400|.nan|.inf|-0.0|1_0|0x|0x_|0o8|010|1:30|2026-11-28|true|null|~|''|'|"|[|]|{|}|[]|{}
[[[[]]]]|*a|&a [*a]|&a b|!!python/object:os.system x|!!binary aGk=|!!set {a}|!!omap [a: 1]
!!pairs [a: 1, b]|!!int x|!!int ''|!!float x|!!bool x|!!null x|!!seq x|!!map x|!x 3
!!timestamp 2026-99-99|<<|{<<: 1}|{1: 2}|{null: 1}|{[a]: 1}|? x|- a|a: b|# x|x # y|%YAML 1.1|---|--- a
...|@x|`x`|%x|!|=|a=b|..|/|~root|~nobody-here/x|s3://x|nosuch://x|http://u:p@h/x|http://h:99999/x|file://
１２|٣|1,000|é|💥|18446744073709551616|9223372036854775807|-9223372036854775809|"\\ud800"|"\\0"|"\\x1b[31m"
["\\ud800"]|{"\\0": 1}|[bold]|[/b]
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
VALUES += ["", "\t", "\0", "a\0b", "\x07", "\x1b[31m", "a\nb", "--- a\n--- b", "|\n a", "\u2028", "\ufeff3", "\udcff"]
VALUES += ["9" * 30, "9" * 5000, "x" * 300, "x" * 5000, "[" * 50 + "]" * 50, "[" * 200 + "]" * 200, "{a: " * 200]


def keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a section and of those in it."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}{name}.")


KEYS = [
    *keys(RunConfig),
    "",
    "a..b",
    "name.x",
    "train.steps.x",
    "no such",
    "é",
    "\x1b[31m",
    ".".join("a" * 3000),
    "=",
    "1",
]


def outcome(call: Callable[[], Any], *names: str) -> str:
    """`accepted` or `refused`; any other error than a user error with a sentence that holds `names` is raised."""
    try:
        call()
    except CherryError as error:
        assert error.exit_code in USER_EXIT_CODES
        text = str(error)
        assert all(name in text for name in names), text
        assert not {c for c in text if ord(c) < 32} - {"\n"}, f"{text!r} would act on a terminal"
        return "refused"
    return "accepted"


@pytest.mark.parametrize("seed", range(3))
def test_overrides_are_accepted_or_refused(seed: int) -> None:
    rng, seen = random.Random(seed), Counter[str]()
    files = [read_yaml(path) for path in CONFIGS]
    for _ in range(700):
        overrides = [rng.choice(KEYS) + rng.choice(["=", "=", "=", "", "=="]) + rng.choice(VALUES)]
        overrides += [overrides[0]] if rng.random() < 0.1 else []
        overrides += [f"{rng.choice(KEYS)}={rng.choice(VALUES)}"] if rng.random() < 0.3 else []
        raw = rng.choice(files)

        def resolve(raw: dict[str, Any] = raw, overrides: list[str] = overrides) -> None:
            config = validate(apply_overrides(raw, overrides), RunConfig, origin="here")
            assert validate(parse_yaml(dump(config), "its dump"), RunConfig, origin="its dump") == config

        seen[outcome(resolve)] += 1
    assert seen["accepted"] > 10 and seen["refused"] > 300


def mutated(text: str, rng: random.Random) -> bytes:
    """A config file's text with a few lines left out, repeated, moved, cut, indented or with other values."""
    lines = text.splitlines(keepends=True)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(lines))
        place = rng.randint(0, len(lines[i]))
        lines[i : i + 1] = rng.choice(
            [
                [],
                [lines[i], lines[i]],
                [lines[rng.randrange(len(lines))]],
                [lines[i].split(":")[0] + f": {rng.choice(VALUES)}\n"],
                [lines[i][:place] + rng.choice(VALUES) + lines[i][place:]],
                [lines[i][:place]],
                [rng.choice(["  ", "\t", ""]) + lines[i].lstrip()],
                [lines[i].replace(":", rng.choice(["", ": [", ": &a", ": -"]))],
            ]
        ) or ["\n"]
    data = "".join(lines).encode("utf-8", "surrogatepass")
    encodings = [b"\xff\xfe" + data, data.decode("utf-8", "replace").encode("utf-16"), b"\xef\xbb\xbf" + data]
    cut = data[: rng.randrange(len(data) + 1)]
    return rng.choice([*encodings, cut, data.replace(b"\n", b"\r")]) if rng.random() < 0.15 else data


@pytest.mark.parametrize("seed", range(2))
def test_changed_config_files_are_accepted_or_refused_by_name(seed: int, tmp_path: Path) -> None:
    rng, seen = random.Random(seed), Counter[str]()
    for _ in range(500):
        path = rng.choice([*CONFIGS, *CLUSTERS])
        schema: type[Section] = ClusterSpec if path in CLUSTERS else RunConfig
        (tmp_path / "changed.yaml").write_bytes(mutated(path.read_text(), rng))
        seen[outcome(lambda schema=schema: load(tmp_path / "changed.yaml", schema), "changed.yaml")] += 1
    assert seen["accepted"] > 50 and seen["refused"] > 200


def laid_out(folder: Path) -> list[str]:
    """Names of what a person may point a command at by mistake, made in `folder`."""
    (folder / "file").write_text("x")
    (folder / "empty.yaml").write_text("")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "deep.yaml").write_text("[" * 10_000)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "gone").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    for name, config in (("good", CONFIGS[-1].read_text()), ("broken", "a: [\n"), ("other", "- 3\n")):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "config.yaml").write_text(config)
    (folder / "runs" / "folder" / "config.yaml").mkdir(parents=True)
    return [*map(str, folder.iterdir()), *os.listdir(folder), *os.listdir(folder / "runs"), "file/x", "gone/x", "."]


WORDS = [
    "",
    "-",
    "--",
    "-x",
    "--x=1",
    "tiny",
    "16b",
    "local",
    "h100-256",
    "nosuch",
    "..",
    "/",
    "\udcff",
    "a\udcffb",
    "é",
]
WORDS += [
    "\x1b[31m",
    "a\nb",
    "x" * 300,
    "~nobody-here",
    "s3://b/x",
    "http://u:p@h/",
    "-1",
    "1",
    "9" * 20,
    "nan",
    "[/b]",
]
# CONFIG, WORD and KEY=VALUE are drawn.
COMMANDS = """
run CONFIG --dry-run
run CONFIG --dry-run KEY=VALUE
run CONFIG KEY=VALUE KEY=VALUE
run CONFIG KEY WORD
deploy CONFIG KEY=VALUE
deploy CONFIG --model-version WORD
plan CONFIG
plan CONFIG KEY=VALUE --json
plan tiny --cluster CONFIG
plan WORD WORD
plan tiny --cluster laptop --plot WORD
status WORD
status WORD --json
status WORD --runs-directory WORD
logs WORD --step WORD
logs WORD --lines WORD
logs WORD --rank WORD
top WORD --once
top good --runs-directory WORD
logs good --runs-directory WORD
compare WORD WORD
quantize WORD
quantize WORD WORD --workers none
compare good WORD --runs-directory WORD
rm WORD --yes
rm WORD
rm good --runs-directory WORD
gc
gc --runs-directory WORD
stop --runs-directory WORD
init WORD
schema --write WORD
doctor --runs-directory WORD
completion WORD
WORD
WORD WORD
demo WORD
setup WORD
setup --notify-file WORD
init WORD WORD
compare WORD
completion
cluster WORD
cluster ls --runs-directory WORD
cluster up CONFIG --name WORD --nodes WORD
cluster down WORD --runs-directory WORD
cluster reap --runs-directory WORD
cluster check CONFIG
cluster render CONFIG KEY=VALUE
cluster render tiny cluster=clusters/slurm KEY=VALUE
services WORD
services status --directory WORD
services down --directory WORD
""".strip().splitlines()


@pytest.mark.parametrize("seed", range(2))
def test_command_lines_end_with_a_sentence_and_leave_nothing(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "here"  # `..` is drawn too, and must not lead to what other tests left
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(TemporaryServer, "start", lambda _: exit(STARTED))
    words = [*WORDS, *laid_out(folder)]
    rng, seen = random.Random(seed), Counter[object]()
    assert isinstance(sys.stderr, io.TextIOWrapper)
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own is, for words that are no UTF-8
    for _ in range(200):
        drawn = [_drawn(word, words, rng) for word in rng.choice(COMMANDS).split()]
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            main(drawn)
        code, told = ended.value.code, capsys.readouterr().err
        assert code in (0, None, STARTED) or code in USER_EXIT_CODES, (drawn, code, told)
        if code in USER_EXIT_CODES:
            assert "rror: " in told and "Traceback" not in told, (drawn, told)
            assert sorted(tmp_path.rglob("*")) == before, drawn
        seen[code] += 1
    assert seen[0] > 5 and seen[11] > 20 and seen[12] > 20


def _drawn(word: str, words: list[str], rng: random.Random) -> str:
    if word == "KEY=VALUE":
        return f"{rng.choice(KEYS)}={rng.choice(VALUES)}"
    if word == "CONFIG" and rng.random() < 0.6:
        return rng.choice(["tiny", "local", "laptop", "16b"])
    return rng.choice(words) if word in ("CONFIG", "WORD") else word


def test_every_command_is_drawn() -> None:
    assert set(cli.commands) <= {line.split()[0] for line in COMMANDS}


@pytest.mark.parametrize("key", ["runs_directory", "checkpoint.directory"])
def test_a_file_in_the_place_of_a_directory_is_told_before_anything_starts(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/deeper"):
        with pytest.raises(SystemExit) as ended:
            main(["run", "tiny", f"{key}={place}"])
        assert ended.value.code in (11, 12)
        assert f"{key} {place}" in (told := capsys.readouterr().err) and "file is a file" in told
        assert os.listdir(tmp_path) == ["file"]


def test_a_path_with_brackets_is_printed_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["status"], ["gc"]):
        with pytest.raises(SystemExit):
            main([*command, "--runs-directory", "a[/b]c[red]"])
        assert "a[/b]c[red]" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["run", "tiny", "runs_directory=a[/b]c[red]", "--dry-run"])
    assert ended.value.code in (0, None)
    assert "a[/b]c[red]/tiny" in capsys.readouterr().out.replace("\n", "")


def test_a_value_that_no_key_takes_is_told_with_its_place_beside_the_others() -> None:
    raw = {**read_yaml(CONFIGS[-1]), "data": {"source": "a\0"}, "train": {"steps": 2**63, "batch_size": "x"}}
    with pytest.raises(ConfigError) as caught:
        validate(raw, RunConfig, origin="here")
    for line in ("data.source: must not hold a null character", "train.steps: must be a number of at most 64 bits"):
        assert line in str(caught.value)
    assert "train.batch_size: input should be a valid integer" in str(caught.value)
