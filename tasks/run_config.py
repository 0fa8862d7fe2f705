"""Owns the whole configuration of a run: a training job, and the steps around it.

It needs no torch, no prefect and no mlflow: `train.py` and a planner read the same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from anything.serve_config import ServeConfig
from base.config import Problem, Section
from cherry.job_config import JobConfig


class RetryConfig(Section):
    """How often the train task is started again after the world's fault."""

    attempts: PositiveInt = 3
    delay_s: NonNegativeFloat = 5.0


class PlanConfig(Section):
    """What a plan that does not fit means for a run (`cherry plan`)."""

    refuse: bool = True
    """Take no hosts when the plan says that memory is short. `false` only warns."""


class QuantizeConfig(Section):
    """Weight-only quantization of experts and projections."""

    format: Literal["int8"] = "int8"
    max_dnll: PositiveFloat = 0.02
    """Largest rise of the held-out loss (nats per token) that the quantized weights may cost, surely: the one-sided
    bound at evaluate.confidence is held against it."""


class EvaluateConfig(Section):
    """The paired comparison on held-out documents."""

    documents: PositiveInt = 200
    max_document_tokens: PositiveInt = 512
    bootstrap_samples: PositiveInt = 2000
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    margin_nats: NonNegativeFloat = 0.00995
    """A difference below this (nats per token; ln(1.01)) counts as none."""
    seed: NonNegativeInt = 0


class RegisterConfig(Section):
    """The MLflow registry."""

    model_name: str = "cherry-tiny"
    champion_alias: str = "champion"
    candidate_alias: str = "candidate"


class DeployConfig(Section):
    """How a release takes over traffic."""

    artifact: Literal["quantized", "export"] = "quantized"
    traffic_steps_percent: tuple[int, ...] = (25, 100)
    requests_per_step: PositiveInt = 8
    """Requests that must have reached the new version before its share is judged."""
    max_error_rate: float = Field(default=0.0, ge=0.0, lt=1.0)
    start_timeout_s: PositiveFloat = 120.0
    smoke_prompt: str = "def "
    smoke_max_tokens: PositiveInt = 16

    def problems(self) -> Iterator[Problem]:
        """Traffic must rise to 100 %."""
        steps = self.traffic_steps_percent
        if not steps or list(steps) != sorted(set(steps)) or steps[-1] != 100 or steps[0] <= 0:
            rule = "must be rising percentages that end at 100, like [5, 25, 100]"
            yield Problem("traffic_steps_percent", rule, list(steps))


class TrackingConfig(Section):
    """Where runs and model versions are recorded."""

    uri: str | None = None
    """Tracking URI of MLflow, or `json:` for JSON files without MLflow (in `<runs_directory>/tracking`, or in PATH with
    `json:PATH`). `None` takes MLFLOW_TRACKING_URI, else SQLite inside the runs directory."""
    experiment: str = "cherry"
    system_metrics: bool = True
    """Record processor, memory, disk and GPU use beside each step (MLflow only)."""


class RunConfig(JobConfig):
    """A whole run, from data to registration (train_flow) and to traffic (deploy_flow)."""

    runs_directory: str = "runs"
    cluster: str = "local"
    """`local`, or the path of a cluster spec in configs/clusters/."""
    plan: PlanConfig = PlanConfig()
    retry: RetryConfig = RetryConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    register_model: RegisterConfig = RegisterConfig()
    serve: ServeConfig = ServeConfig()
    deploy: DeployConfig = DeployConfig()
    tracking: TrackingConfig = TrackingConfig()
