"""Flags of train.py and of cherry-launch with any values are accepted, or refused by a sentence; nothing is started."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from base.errors import USER_EXIT_CODES, CherryError, PortInUseError
from cherry import launcher, rank_main

VALUES = ["", "-", "--", "-1", "0", "1", "2", "3", "1.5", "1e-5", "nan", "inf", "9" * 20, "9" * 5000, "1_0"]
VALUES += ["0x10", "１", "file", "folder", "loop", "gone", "gone/x", "file/x", "empty", "list", "null", "deep"]
VALUES += ["keys", "w.pt", "no/w.pt", "tiny", "16b", "nosuch", "nosuch/", "nosuch://x", "http://u:p@h/x"]
VALUES += ["\udcff", "é", "x" * 300, "a\nb", "\x1b[31m"]
OVERRIDES = ["x", "=", "a..b=1", "train.steps=", "train.steps=0x_", 'data.source="\\0"', "model={", "name=é", "train=3"]
TRAIN = ["--config", "--run_dir", "--run-dir", "--model_path", "--resume_from", "--batch_size", "--learning_rate"]
TRAIN += ["--gradient_accumulation_steps", "--steps", "--set", "--batch", "--nosuch"]


def laid_out(folder: Path) -> None:
    """What flags may point at by mistake."""
    (folder / "file").write_text("x")
    (folder / "w.pt").write_text("x")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "folder" / "config.json").mkdir(parents=True)
    configs = {"empty": "{}", "list": "[]", "null": "null", "deep": "[" * 5000, "keys": '{"model_type": "deepseek_v3"}'}
    for name, text in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)


@pytest.mark.parametrize("seed", range(2))
def test_flags_of_the_training_program(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    laid_out(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    rng, seen = random.Random(seed), Counter[int]()
    for _ in range(300):
        given = ["--config", "tiny"] if rng.random() < 0.7 else []
        for _ in range(rng.randint(0, 3)):
            flag = rng.choice(TRAIN)
            value = rng.choice(OVERRIDES if flag == "--set" else VALUES)
            given += [flag, value] if rng.random() < 0.5 else [f"{flag}={value}"]
        code = 0
        try:
            options = rank_main.build_parser().parse_args(given)
            config = rank_main.resolve(options)
            rank_main.check_directories(config, options.run_dir or f"runs/{config.name}")
        except CherryError as error:
            code = error.exit_code
            assert code in USER_EXIT_CODES and str(error), given
        seen[code] += 1
    assert sorted(tmp_path.rglob("*")) == before
    assert seen[0] > 20 and seen[11] > 50 and seen[12] > 5


@pytest.mark.parametrize("place", ["file", "file/deeper", "gone", "loop", "x" * 300])
@pytest.mark.parametrize("flag", ["--run_dir=", "--set=checkpoint.directory="])
def test_a_directory_that_cannot_be_made_is_a_config_error(
    flag: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    laid_out(tmp_path)
    monkeypatch.setattr(os, "_exit", exit)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        rank_main.main(["--config=tiny", "--run_dir=fine", f"{flag}{place}"])
    assert ended.value.code == 11
    assert f"{flag.removeprefix('--set=').removesuffix('=')} {place}: " in capfd.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


LAUNCH = ["--nproc_per_node", "--nproc-per-node", "--nnodes", "--node_rank", "--master_addr", "--master_port"]
LAUNCH += ["--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf", "--max-restarts", "--monitor-interval"]
LAUNCH += ["--start-method", "--role", "--redirects", "--tee", "--local-ranks-filter", "--log-dir", "--local-addr"]
LAUNCH += ["--standalone", "--no-python", "-m", "--nosuch", "--run-path", "--duplicate-stdout-filters"]
WORDS = ["", "-", "-1", "0", "1", "2", "1:2", "2:1", "1:", "x", "auto", "gpu", "cpu", "9" * 20, "1.5", "nan"]
WORDS += ["a=b", "a=b,c", "static", "c10d", "etcd", "localhost", "localhost:0", "localhost:x", "[::1]:1", "é"]
WORDS += ["\udcff", "x" * 300, "file", "spawn", "3", "0:1,1:2", "0:9"]


@pytest.mark.parametrize("seed", range(2))
def test_flags_of_the_launcher(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.launcher.api as launcher_api

    def started(config: Any, entrypoint: Any) -> Any:
        raise SystemExit(0)

    monkeypatch.chdir(tmp_path)
    laid_out(tmp_path)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(launcher_api, "elastic_launch", started)
    monkeypatch.setattr(launcher, "_pass_on_signals", lambda _: None)  # a thread for each case
    rng, seen = random.Random(seed), Counter[int]()
    for _ in range(250):
        given: list[str] = []
        for _ in range(rng.randint(0, 3)):
            flag, word = rng.choice(LAUNCH), rng.choice(WORDS)
            given += [flag] if rng.random() < 0.1 else [f"{flag}={word}"] if rng.random() < 0.6 else [flag, word]
        given += ["train.py"] if rng.random() < 0.9 else []
        try:
            launcher.launch(given)
        except SystemExit as ended:
            assert ended.code in (0, None), given
            seen[0] += 1
        except PortInUseError:  # the one that is the world's
            continue
        except CherryError as error:
            assert error.exit_code in USER_EXIT_CODES and str(error), given
            seen[error.exit_code] += 1
    assert seen[0] > 10 and seen[11] > 50
