"""Owns the whole configuration of a run: a training job, and the steps around it.

It needs no torch, no prefect and no mlflow: `train.py` and a planner read the same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from anything.router.kinds import DEFAULT_KIND, KINDS, kind_rule
from anything.serve_config import ServeConfig
from base.config import Problem, Section
from cherry.job_config import JobConfig
from model.numerics.formats import DEFAULT_FORMAT, FORMATS, format_rule


class RetryConfig(Section):
    """How often the train task is started again after the world's fault."""

    attempts: PositiveInt = 3
    delay_s: NonNegativeFloat = 5.0


class PlanConfig(Section):
    """What a plan that does not fit means for a run (`cherry plan`)."""

    refuse: bool = True
    """Take no hosts when the plan says that memory is short. `false` only warns."""


class QuantizeConfig(Section):
    """Quantization of the exported weights for serving."""

    format: str = DEFAULT_FORMAT
    """One of the registered formats (model/numerics/formats.py)."""
    max_dnll: PositiveFloat = 0.02
    """Largest rise of the held-out loss (nats per token) that the quantized weights may cost, surely: the one-sided
    bound at evaluate.confidence is held against it."""

    def problems(self) -> Iterator[Problem]:
        """The format must be registered."""
        if self.format not in FORMATS:
            yield Problem("format", format_rule(), self.format)


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
    replica_kind: str = DEFAULT_KIND
    """Kind of server to start (anything/router/kinds.py)."""
    traffic_steps_percent: tuple[int, ...] = (25, 100)
    requests_per_step: PositiveInt = 8
    """Requests that must have reached the new version before its share is judged."""
    max_error_rate: float = Field(default=0.0, ge=0.0, lt=1.0)
    start_timeout_s: PositiveFloat = 120.0
    smoke_prompt: str = "def "
    smoke_max_tokens: PositiveInt = 16

    def problems(self) -> Iterator[Problem]:
        """The kind must be registered, and traffic must rise to 100 %."""
        if self.replica_kind not in KINDS:
            yield Problem("replica_kind", kind_rule(), self.replica_kind)
        steps = self.traffic_steps_percent
        if not steps or list(steps) != sorted(set(steps)) or steps[-1] != 100 or steps[0] <= 0:
            rule = "must be rising percentages that end at 100, like [5, 25, 100]"
            yield Problem("traffic_steps_percent", rule, list(steps))


class TrackingConfig(Section):
    """Where runs are recorded."""

    uri: str | None = None
    """MLflow tracking URI; `None` takes MLFLOW_TRACKING_URI, else SQLite inside the runs directory."""
    experiment: str = "cherry"
    system_metrics: bool = True


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
