"""A worker process: it answers in JSON lines, tells an error as a record, and ends with its input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from base.errors import WeightsError
from model.weights.reader import WeightsReader


def test_a_worker_answers_tells_its_error_and_ends_with_its_input(bf16_folder: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "model.quantization.worker", bf16_folder, str(tmp_path), "int8", "1"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def tell(file: str, name: str) -> None:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"file": file, "groups": [[name]]}) + "\n")
            process.stdin.flush()

        reader = WeightsReader(bf16_folder)
        file = reader.files[0]
        name = reader.names_in(file)[0]
        tell(file, name)
        read, done = (json.loads(process.stdout.readline()) for _ in range(2))
        info = reader.info(name)
        assert read == {"read": info.stop - info.start}
        assert (done["done"]["file"], (tmp_path / file).stat().st_size) == (file, done["done"]["bytes"])
        tell(file, "no.such.weight")
        error = json.loads(process.stdout.readline())["error"]
        assert (error["exit_code"], error["kind"]) == (WeightsError.exit_code, "WeightsError")
        assert process.wait() == 0


def test_a_worker_whose_parent_is_gone_ends(bf16_folder: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "model.quantization.worker", bf16_folder, str(tmp_path), "int8", "1"]
    ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout) == (0, b"")
