"""Deterministic mode: the same bits again, seeds that differ between ranks, and an error for what has no kernel."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from base.errors import ConfigError
from cherry.determinism import use_deterministic_algorithms
from cherry.rank_main import classify_error

DETERMINISTIC = ("--set", "train.deterministic=true")
gpu = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process in deterministic mode, of seed 7 and rank 1; as it was, afterwards."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    use_deterministic_algorithms(7, 1)
    yield
    torch.use_deterministic_algorithms(False)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.mark.usefixtures("deterministic")
def test_an_operator_without_a_deterministic_kernel_is_a_config_error_that_names_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    error = classify_error(caught.value)
    assert isinstance(error, ConfigError)
    assert "train.deterministic" in str(error) and "put_ has no deterministic kernel" in str(error)


@pytest.mark.usefixtures("deterministic")
def test_every_generator_is_seeded_by_seed_and_rank() -> None:
    drawn = random.random(), np.random.random(), torch.rand(1).item()
    use_deterministic_algorithms(7, 1)
    assert drawn == (random.random(), np.random.random(), torch.rand(1).item())
    use_deterministic_algorithms(7, 0)
    other = random.random(), np.random.random(), torch.rand(1).item()
    assert all(one != another for one, another in zip(drawn, other, strict=True))


@pytest.mark.slow
def test_two_runs_are_equal_bit_for_bit(make_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    first, second = make_job("first"), make_job("second")
    for job in (first, second):
        ended = job.run(*DETERMINISTIC, "--steps=6", ranks=2)
        assert ended.returncode == 0, ended.stderr
    keys = ("loss", "mtp_loss", "balance_loss", "grad_norm")
    rows = [[[line[key] for key in keys] for line in job.metrics] for job in (first, second)]
    assert len(rows[0]) == 6 and rows[0] == rows[1]


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=gpu), pytest.param("bf16", marks=gpu)])
@pytest.mark.parametrize("apart", ["true", "false"])
def test_two_runs_and_a_resume_on_a_gpu_are_equal_bit_for_bit(make_job: Any, precision: str, apart: str) -> None:
    flags = (*DETERMINISTIC, "--set", f"train.precision={precision}", "--set", f"data.cross_document_attention={apart}")
    first, second, resumed = (make_job(name) for name in ("first", "second", "resumed"))
    for job in (first, second, resumed):
        if job is resumed:
            shutil.copytree(first.directory / "train", Path(job.directory, "train"))
            shutil.rmtree(job.checkpoint(12))
        ended = job.run(*flags)
        assert ended.returncode == 0, ended.stderr
    assert len(first.losses) == 12
    assert first.losses == second.losses == resumed.losses
    norms = [[line["grad_norm"] for line in job.metrics] for job in (first, second, resumed)]
    assert norms[0] == norms[1] == norms[2]
