"""The quantize step: the configured format is given to the program."""

import warnings

import pytest
from prefect.logging import disable_run_logger

from base import storage
from base.errors import ConfigError
from tasks.overrides import resolve
from tasks.quantize import quantize
from tasks.steps import RunContext, StepRecord


@pytest.mark.slow
def test_the_program_gets_the_format(tmp_path):
    config = resolve("configs/tiny.yaml", {"name": "one", "runs_directory": str(tmp_path)})
    unchecked = config.model_copy(update={"quantize": config.quantize.model_copy(update={"format": "int3"})})
    context = RunContext(str(tmp_path / "one"), unchecked)
    storage.commit(str(context.path / "export"))
    exported = StepRecord("export", "f", {"export": str(context.path / "export")}, {}, 1.0, 0.0, None, None)
    with disable_run_logger(), warnings.catch_warnings(), pytest.raises(ConfigError, match=r"\(got 'int3'\)"):
        warnings.simplefilter("ignore")  # what MLflow's tables use, which shows when they are first used
        quantize.fn(context, exported)
