"""Command lines of `anything` and the files that they name: accepted, or refused by a sentence; nothing is served."""

from __future__ import annotations

import io
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from anything import cli
from base.errors import USER_EXIT_CODES

NOTHING_ANSWERS = 35
FILES = {
    "text": b"x",
    "deep": b"[" * 100_000,
    "list": b"[]",
    "null": b"null",
    "bytes": bytes(range(256)),
    "keys": b'{"keys": [{"key_id": "a", "sha256": "0", "created": 0}]}',
    "typed": b'{"keys": [{"key_id": 1, "sha256": null, "created": "x"}]}',
    "number": b'{"keys": 3}',
    "open.yaml": b"serve: [\n",
    "flat.yaml": b"serve: 3\n",
    "serve.yaml": b"serve: {port: 0}\n",
}
WORDS = [
    "",
    "-",
    "nosuch",
    "text/x",
    "folder",
    "loop",
    "\udcff",
    "é",
    "a\nb",
    "x" * 300,
    "-1",
    "0",
    "1",
    "65536",
    "9" * 25,
]
WORDS += [
    "nan",
    "inf",
    "1e400",
    "localhost:1",
    "ftp://127.0.0.1",
    "http://",
    "http://x:99999",
    "http://127.0.0.1:1/\x07",
]
WORDS += ["nosuch://x", "http://u:p@127.0.0.1:1", "http://127.0.0.1:1", "~nobody-here", *FILES]
ADDRESS = "http://127.0.0.1:1"
# WORD is drawn.
COMMANDS = f"""
serve --model_path WORD --port 0 --key_file keys
serve --model_path folder --port 0 --key_file WORD
serve --routes WORD --port 0 --key_file keys
serve --routes list --port WORD --key_file keys
serve --routes list --config WORD --port 0 --key_file keys
serve --routes list --port 0 --port_file WORD --key_file keys
serve --model_path folder --port 0 --model_version WORD --key_file keys
serve WORD WORD
key list --key_file WORD
key create --key_file WORD
key revoke WORD --key_file WORD
infer WORD --url {ADDRESS}
infer p --url WORD
infer p --stream --url WORD
infer p --max_tokens WORD --url {ADDRESS}
infer p --temperature WORD --url {ADDRESS}
infer p --seed WORD --url {ADDRESS}
WORD WORD
""".strip().splitlines()


@pytest.mark.parametrize("seed", range(2))
def test_command_lines_end_with_a_sentence(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(cli.KEY_ENVIRONMENT, "k")
    monkeypatch.setattr(cli.DrainingServer, "run", lambda _: None)  # it would serve until a signal
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert isinstance(sys.stderr, io.TextIOWrapper)
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own is, for words that are no UTF-8
    rng, seen = random.Random(seed), Counter[Any]()
    for _ in range(150):
        given = [rng.choice(WORDS) if word == "WORD" else word for word in rng.choice(COMMANDS).split(" ")]
        code = cli.main(given)
        told = capsys.readouterr().err
        assert code in (0, NOTHING_ANSWERS) or code in USER_EXIT_CODES, (given, code, told)
        assert code == 0 or "error: " in told, (given, told)
        assert code != NOTHING_ANSWERS or given[0] == "infer", given
        seen[code] += 1
    assert seen[0] > 2 and seen[11] > 20 and seen[12] > 20
