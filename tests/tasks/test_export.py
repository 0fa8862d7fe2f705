"""The export step: a trained checkpoint as a committed folder in bf16, found again for the same training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from prefect.logging import disable_run_logger

from base import storage
from base.errors import MissingFileError
from model.weights.reader import WeightsReader
from tasks.export import export
from tasks.overrides import resolve, write_resolved
from tasks.steps import RunContext, StepRecord

pytestmark = pytest.mark.slow


def context_of(job: Any) -> RunContext:
    """A run over a job's directory, tracked in JSON files."""
    overrides = {"runs_directory": str(job.directory.parent), "tracking": {"uri": "json:"}}
    config = resolve(str(job.config), overrides)
    assert write_resolved(config) == str(job.directory)
    return RunContext(str(job.directory), config)


def trained(checkpoint: object) -> StepRecord:
    return StepRecord("train", "f", {"checkpoint": str(checkpoint)}, {}, 1.0, 0.0, None, None)


def test_the_checkpoint_is_exported_once_in_bf16(make_job: Callable[[str], Any]) -> None:
    job = make_job("mini")
    done = job.run()
    assert done.returncode == 0, done.stdout + done.stderr
    context = context_of(job)
    with disable_run_logger():
        record = export.fn(context, trained(job.checkpoint(12)))
        again = export.fn(context, trained(job.checkpoint(12)))
    assert storage.is_committed(record.outputs["export"])
    reader = WeightsReader(record.outputs["export"])
    assert reader.dtype("lm_head.weight") == torch.bfloat16
    files = (job.directory / "export").glob("*.safetensors")
    assert record.figures["bytes"] == sum(path.stat().st_size for path in files)
    assert (record.reused, again.reused) == (False, True)


def test_a_checkpoint_that_is_not_there_is_named_and_leaves_no_valid_folder(make_job: Callable[[str], Any]) -> None:
    job = make_job("mini")
    context = context_of(job)
    with disable_run_logger(), pytest.raises(MissingFileError, match="step_9"):
        export.fn(context, trained(job.checkpoint(9)))
    assert not storage.is_committed(str(job.directory / "export"))
