"""The configuration of a run: a training job and the steps around it.

The docstrings of keys are the user's documentation: they are the descriptions in the JSON schema. No torch, Prefect or
MLflow is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from anything.router.kinds import DEFAULT_KIND, KINDS, kind_rule
from anything.serve_config import ServeConfig
from base.config import Problem, Section
from cherry.hardware import GPUS
from cherry.job_config import JobConfig
from model.calibration.names import METHODS, NEAREST, method_rule, misfit
from model.numerics.formats import AUTO, DEFAULT_FORMAT, FORMATS, format_rule


class RetryConfig(Section):
    """Retries of the train step after a transient error, and of a deployment's run after a crash."""

    attempts: PositiveInt = 3
    """Attempts, the first one included."""
    delay_s: NonNegativeFloat = 5.0
    """Seconds between two attempts."""


class PlanConfig(Section):
    """Handling of a plan (`cherry plan`) that does not fit into memory."""

    refuse: bool = True
    """End before any host is taken when the plan does not fit into memory; `false` only logs a warning."""


class QuantizeConfig(Section):
    """Quantization of the exported weights for serving."""

    format: str = DEFAULT_FORMAT
    """Format of the quantized weights: one of those in model/numerics/formats.py, or `auto`, the one that suits the GPU
    that serves them."""
    compare: tuple[str, ...] = ()
    """Other formats to quantize in and to judge beside it; they are not served. Those that the model's sizes do not fit
    are left out."""
    method: str = NEAREST
    """How int4 weights (the routed experts of w4a16) are rounded: `nearest`, or calibrated on the run's own training
    data: `gptq`, `awq`, or `search` for the scales alone. docs/quantization.md compares them."""
    calibration_tokens: PositiveInt | None = None
    """Tokens of the training data that a calibration takes; `null` is 128 sequences."""
    gpu: str | None = None
    """GPU that serves them, for `auto`, like `H100`; `null` is the cluster file's, or this machine's."""
    max_dnll: PositiveFloat = 0.02
    """Largest increase of the held-out loss, in nats per token, that quantization may cause. The upper confidence bound
    of the increase, one-sided at evaluate.confidence, must not exceed it."""
    max_kl: PositiveFloat = 0.1
    """Largest divergence KL(export || quantized) of the next token's distribution, in nats per token. Its upper bound
    must not exceed it."""
    min_top1: float = Field(default=0.9, gt=0.0, lt=1.0)
    """Smallest share of tokens for which export and quantized weights agree on the likeliest one. Its lower bound must
    not be below it."""
    fallback: str | None = None
    """Format to propose where they cost more; `null` is the registry's next milder one."""

    def problems(self) -> Iterator[Problem]:
        """Problems with formats that are not registered, methods that do not fit them, and an unknown GPU."""
        if self.format not in (*FORMATS, AUTO):
            yield Problem("format", f"{format_rule()}, {AUTO}", self.format)
        elif self.method in METHODS and (rule := misfit(self.method, self.format)) is not None:
            yield Problem("method", rule, self.method)
        if self.method not in METHODS:
            yield Problem("method", method_rule(), self.method)
        if self.calibration_tokens is not None and self.method == NEAREST:
            rule = f"must be null with quantize.method {NEAREST}, which needs no calibration"
            yield Problem("calibration_tokens", rule, self.calibration_tokens)
        for number, name in enumerate(self.compare):
            if name not in FORMATS:
                yield Problem(f"compare.{number}", format_rule(), name)
            elif name in self.compare[:number]:
                yield Problem(f"compare.{number}", "must name each format once", name)
        if self.fallback is not None and self.fallback not in FORMATS:
            yield Problem("fallback", f"{format_rule()}, null", self.fallback)
        if self.gpu is not None and self.gpu not in GPUS:
            yield Problem("gpu", f"unknown hardware; known are {', '.join(GPUS)}", self.gpu)


class EvaluateConfig(Section):
    """Paired comparison of the candidate with the champion on held-out documents."""

    documents: PositiveInt = 200
    """Held-out documents to score."""
    max_document_tokens: PositiveInt = 512
    """Tokens of a document that are scored; the rest is cut off."""
    bootstrap_samples: PositiveInt = 2000
    """Bootstrap samples of the confidence interval."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Confidence level of the interval that decides the verdict."""
    margin_nats: NonNegativeFloat = 0.00995
    """Differences below this many nats per token count as none; the default is ln(1.01)."""
    seed: NonNegativeInt = 0
    """Seed of the bootstrap."""


# What MLflow's registry refuses (mlflow 3.17, utils/validation.py): of models, logged models and aliases.
_REFUSED = ("/", ":", ".", "%", '"', "'")
_NAME_CHARACTERS = 255
_ALIAS_CHARACTERS = 255
_ALIAS = re.compile(r"[\w\-]+")
_RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)
SERVING_ALIAS = "serving"
"""Alias of the version that a release serves."""


class RegisterConfig(Section):
    """The MLflow model registry."""

    model_name: str = "cherry-tiny"
    """Registered model that the run's weights become a version of."""
    champion_alias: str = "champion"
    """Alias of the best version so far, which new ones are compared with."""
    candidate_alias: str = "candidate"
    """Alias of the newest version."""

    def problems(self) -> Iterator[Problem]:
        """Names that the model registry refuses, which would show after all training; and aliases of two meanings."""
        if (
            not self.model_name.strip()
            or len(self.model_name) > _NAME_CHARACTERS
            or any(one in self.model_name for one in _REFUSED)
        ):
            rule = (
                f"must be a name of 1 to {_NAME_CHARACTERS} characters without any of {' '.join(_REFUSED)}, "
                "which the model registry refuses"
            )
            yield Problem("model_name", rule, self.model_name)
        for key, alias in (("champion_alias", self.champion_alias), ("candidate_alias", self.candidate_alias)):
            if not _ALIAS.fullmatch(alias) or len(alias) > _ALIAS_CHARACTERS:
                yield Problem(key, f"must be 1 to {_ALIAS_CHARACTERS} letters, digits, _ or -", alias)
            elif _RESERVED_ALIAS.fullmatch(alias):
                yield Problem(key, "is reserved by the model registry, as are latest, v1, v2, ...", alias)
            elif alias == SERVING_ALIAS:
                yield Problem(key, "is the alias of the version that is served: choose another", alias)
        if self.champion_alias == self.candidate_alias:
            yield Problem("candidate_alias", "must differ from champion_alias", self.candidate_alias)


class DeployConfig(Section):
    """Deployment: the replica, its smoke test, and the steps in which a release takes over traffic."""

    artifact: Literal["quantized", "export"] = "quantized"
    """Weights to serve: the quantized ones or the export."""
    replica_kind: str = DEFAULT_KIND
    """Kind of server to start as a replica: one of those in anything/router/kinds.py."""
    traffic_steps_percent: tuple[int, ...] = (25, 100)
    """Percentages of the traffic that the new version gets, step by step."""
    requests_per_step: PositiveInt = 8
    """Requests that must have reached the new version before a step is checked."""
    max_error_rate: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Largest fraction of failed requests in a step; above it the traffic is rolled back."""
    start_timeout_s: PositiveFloat = 120.0
    """Seconds that a replica may take to start."""
    smoke_prompt: str = "def "
    """Prompt of the smoke test, before any traffic is shifted."""
    smoke_max_tokens: PositiveInt = 16
    """Tokens that the smoke test asks for."""

    def problems(self) -> Iterator[Problem]:
        """Problems with an unregistered kind, or traffic that does not rise to 100 %."""
        if self.replica_kind not in KINDS:
            yield Problem("replica_kind", kind_rule(), self.replica_kind)
        steps = self.traffic_steps_percent
        if not steps or list(steps) != sorted(set(steps)) or steps[-1] != 100 or steps[0] <= 0:
            rule = "must be rising percentages that end at 100, like [5, 25, 100]"
            yield Problem("traffic_steps_percent", rule, list(steps))


# Schemes of tracking URIs that the model registry takes too (mlflow 3.17's own list, and `json` for files without it);
# installed packages add theirs to MLflow by entry points. An empty scheme is a directory.
TRACKING_SCHEMES = (
    *(
        "",
        "json",
        "file",
        "sqlite",
        "postgresql",
        "mysql",
        "mssql",
        "http",
        "https",
        "databricks",
        "databricks-uc",
        "uc",
    ),
)
_TRACKING_PLUGINS = "mlflow.tracking_store"
_EXPERIMENT_CHARACTERS = 500


class TrackingConfig(Section):
    """Tracker of runs and model versions."""

    uri: str | None = None
    """Tracking URI of MLflow, or `json:` for JSON files without MLflow (in `<runs_directory>/tracking`, or in PATH with
    `json:PATH`). `null` takes MLFLOW_TRACKING_URI, else SQLite inside the runs directory."""
    experiment: str = "cherry"
    """Experiment that the runs belong to."""
    system_metrics: bool = True
    """Record this machine's CPU, memory, disk and GPU use during each step (MLflow only), and during training that of
    every node under its name."""

    def problems(self) -> Iterator[Problem]:
        """A tracking URI or experiment that the trackers do not take: registering would fail, after all training."""
        rule = None if self.uri is None else tracking_uri_rule(self.uri)
        if rule is not None:
            yield Problem("uri", rule, self.uri)
        if not 0 < len(self.experiment) <= _EXPERIMENT_CHARACTERS:
            yield Problem("experiment", f"must have 1 to {_EXPERIMENT_CHARACTERS} characters", self.experiment)


def tracking_uri_rule(uri: str) -> str | None:
    """Rule that a tracking URI breaks, which neither MLflow nor the JSON tracker takes; `None` for one that they do."""
    scheme = uri.split(":", 1)[0].split("+")[0] if ":" in uri else ""
    if scheme in TRACKING_SCHEMES or entry_points(group=_TRACKING_PLUGINS, name=scheme):
        return None
    return f"must be a directory or a URI with one of the schemes {', '.join(filter(None, TRACKING_SCHEMES))}"


class RunConfig(JobConfig):
    """A whole run, from data to registration (train_flow) and to traffic (deploy_flow)."""

    runs_directory: str = "runs"
    """Directory of the runs, on a file system that all hosts share."""
    cluster: str = "local"
    """`local` for this machine, or the path of a cluster file, like those in configs/clusters/."""
    plan: PlanConfig = PlanConfig()
    retry: RetryConfig = RetryConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    register_model: RegisterConfig = RegisterConfig()
    serve: ServeConfig = ServeConfig()
    deploy: DeployConfig = DeployConfig()
    tracking: TrackingConfig = TrackingConfig()

    def problems(self) -> Iterator[Problem]:
        """Problems with combinations of keys of several sections."""
        yield from super().problems()
        entry = FORMATS.get(self.quantize.format)
        if entry is not None and (rule := entry.misfit(self.model)) is not None:
            yield Problem("quantize.format", rule, self.quantize.format)
