"""Traffic of a release: shifted to the new replica in steps, each checked with real requests, and rolled back."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from anything.client import Client
from anything.keys import read_key_file
from base.errors import CherryError, ServiceError
from tasks.artifacts import show_table
from tasks.lifecycle import RELEASE_CONFIG
from tasks.processes.replicas import GATEWAY, Server, ServingDirectory
from tasks.records.events import line_of
from tasks.records.figures import name_of
from tasks.release.choice import Release, check_still
from tasks.run_logger import run_logger
from tasks.steps import RunContext, StepRun
from tasks.tracking.protocol import Point

HISTORY_FILE = "release_steps.csv"
"""The steps of the newest release in the run directory; the tracker has those of each."""
# Times the requests that a share of traffic needs on average: subjects are assigned by a hash.
_PATIENCE = 4


@dataclass
class TrafficStep:
    """One step of the shift, as the release's history has it."""

    percent: int
    """Share of the traffic that the new version had."""
    requests: int = 0
    """Requests that the gateway counts as routed to the new version during the step."""
    errors: int = 0
    """Those of them that the new version failed, by the gateway's count."""
    median_ms: float | None = None
    """Median of the probes' latencies, by whichever version answered."""
    outcome: str = "went on"
    reason: str = ""
    """The first error of the step, in words."""


def running_step(context: RunContext, release: Release) -> StepRun:
    """The release as a running step, for its reports."""
    return StepRun(context, "deploy", "", release.run_id, context.tracker().runs, logged=True)


def shift_traffic(context: RunContext, release: Release, replica: Server) -> dict[str, Any]:
    """Steps, gateway and replaced replicas of the shift to `replica`; a breach is rolled back.

    Raises:
        ServiceError: a step's error rate was above deploy.max_error_rate, or too few requests came; the text has the
            first error.
        ConfigError: the champion has changed since the version was chosen.
    """
    serving, config = ServingDirectory(context.config.runs_directory), context.config.deploy
    before = {name: weight for name, weight in serving.weights().items() if weight > 0}
    others = {name: weight for name, weight in before.items() if name != replica.name}
    with _history(context, release) as steps, _rolled_back(serving, before, replica):
        check_still(context, release)
        for percent in config.traffic_steps_percent if others else (100,):
            step = TrafficStep(percent)
            steps.append(step)
            serving.write_routes(_shares(others, replica.name, float(percent)))
            gateway = _gateway(context)
            _probe(context, gateway, replica, step)
            _report(context, release, replica, step)
            _judge(context, replica, step)
    return {"steps": [asdict(step) for step in steps], "gateway": gateway.url, "replaced": sorted(others)}


@contextmanager
def _history(context: RunContext, release: Release) -> Iterator[list[TrafficStep]]:
    """The steps so far; in the end they are published, however the shift ends."""
    steps: list[TrafficStep] = []
    try:
        yield steps
    except BaseException as error:
        if steps:
            steps[-1].outcome = "rolled back"
            steps[-1].reason = steps[-1].reason or line_of(error)
        raise
    finally:
        if steps:
            _publish(context, release, [asdict(step) for step in steps])


def _publish(context: RunContext, release: Release, rows: list[dict[str, Any]]) -> None:
    """Write the history to the run directory, the tracker and Prefect's page."""
    path = context.path / HISTORY_FILE
    with path.open("w", newline="", encoding="utf-8") as handle:
        table = csv.DictWriter(handle, [field.name for field in fields(TrafficStep)])
        table.writeheader()
        table.writerows(rows)
    context.tracker().runs.artifact(release.run_id, path)
    show_table(f"shift-{context.config.name}", rows, f"Traffic to {release.label}")


@contextmanager
def _rolled_back(serving: ServingDirectory, before: Mapping[str, float], replica: Server) -> Iterator[None]:
    """On an error the traffic is as before. A replica that had none is stopped; with no other, so is the gateway."""
    try:
        yield
    except BaseException:
        if before:
            total = sum(before.values())
            serving.write_routes({name: weight / total * 100.0 for name, weight in before.items()})
        else:
            gateway = serving.find(GATEWAY)
            if gateway is not None:
                serving.stop(gateway)
            serving.routes.unlink(missing_ok=True)
        if replica.name not in before:
            serving.stop(replica)
        raise


def _shares(others: Mapping[str, float], name: str, percent: float) -> dict[str, float]:
    """Weights in percent: `percent` for `name`, the rest shared by the others in their former proportions."""
    total = sum(others.values())
    return {**{other: weight / total * (100.0 - percent) for other, weight in others.items()}, name: percent}


def _gateway(context: RunContext) -> Server:
    """Running gateway of these routes and this port, or a new one."""
    serving, serve = ServingDirectory(context.config.runs_directory), context.config.serve
    running = serving.find(GATEWAY)
    if running is not None and running.listens_on(serve.port) and running.model in ("", str(serving.routes)):
        return running
    serving.check_gateway_port(serve.host, serve.port)
    if running is not None:
        serving.stop(running)  # it listens where this release is not wanted, or reads routes that were moved since
    timeout_s = context.config.deploy.start_timeout_s
    config_path = f"{context.directory}/{RELEASE_CONFIG}"
    return serving.start_gateway(config_path, host=serve.host, port=serve.port, timeout_s=timeout_s)


def _probe(context: RunContext, gateway: Server, replica: Server, step: TrafficStep) -> None:
    """Send requests to the gateway until enough have reached the new version, and count them in `step`.

    The counts are the gateway's own of the version, with other clients' requests among them: it may have asked another
    replica after this one failed, and what another replica fails is not this one's fault.
    """
    serving, config = ServingDirectory(context.config.runs_directory), context.config.deploy
    wanted, latencies = config.requests_per_step, list[float]()
    with Client(gateway.url, read_key_file(str(serving.client_key))) as client:
        before = _counted(client, replica.version)
        for number in range(_PATIENCE * wanted * 100 // step.percent):
            started = time.monotonic()
            try:
                prompt = f"{config.smoke_prompt}f{step.percent}_{number}("
                client.infer(prompt, max_tokens=config.smoke_max_tokens)
            except CherryError as error:
                run_logger().warning("request failed: %s", error)
            else:
                latencies.append(time.monotonic() - started)
            counted = _counted(client, replica.version)
            step.requests = counted["requests"] - before["requests"]
            step.errors = counted["errors"] - before["errors"]
            if step.errors and not step.reason:
                step.reason = str(counted["last_error"])
            if step.requests >= wanted:
                break
    step.median_ms = round(1000 * sorted(latencies)[len(latencies) // 2], 1) if latencies else None


def _counted(gateway: Client, version: str) -> dict[str, Any]:
    """What a gateway counts of a version since it started: requests, errors and the newest error."""
    counted: dict[str, Any] = gateway.routes()["versions"].get(version, {})
    return {"requests": 0, "errors": 0, "last_error": None} | counted


def _report(context: RunContext, release: Release, replica: Server, step: TrafficStep) -> None:
    """Tell a step to the terminal and to the tracker."""
    running = running_step(context, release)
    because = f": {step.reason}" if step.reason else ""
    running.say(f"{step.percent} % of traffic on {replica.name}: {_failed(step)}{because}", lasting=True)
    now = int(time.time() * 1000)
    points = [
        Point(name_of(key, "deploy"), float(value), step.percent, now)
        for key, value in asdict(step).items()
        if isinstance(value, int | float)
    ]
    running.tracker.points(release.run_id, points)


def _judge(context: RunContext, replica: Server, step: TrafficStep) -> None:
    """Check a step against the limits.

    Raises:
        ServiceError: it breaks one.
    """
    config, where = context.config.deploy, f"at {step.percent} % of traffic"
    if step.errors > config.max_error_rate * step.requests:
        because = f" The first: {step.reason}" if step.reason else ""
        raise ServiceError(
            f"{replica.name}: {_failed(step)} {where} (deploy.max_error_rate {config.max_error_rate}); traffic was "
            f"rolled back.{because}"
        )
    if step.requests < config.requests_per_step:
        raise ServiceError(
            f"{replica.name}: {step.requests} requests reached it {where}, deploy.requests_per_step asks for "
            f"{config.requests_per_step}; traffic was rolled back"
        )


def _failed(step: TrafficStep) -> str:
    return f"{step.errors} of {step.requests} requests failed"
