"""Deployment of a registered version: its replica, a smoke test, traffic shifted in steps, and the rollback.

Server processes are in tasks/processes/replicas.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from anything.client import Client
from anything.keys import read_key_file
from anything.protocol import Engine, Generation, SamplingParams
from anything.router.kinds import KINDS
from base import storage
from base.errors import CherryError, ConfigError, MissingFileError, ServiceError
from tasks.artifacts import show_table
from tasks.lifecycle import RELEASE_CONFIG
from tasks.processes.replicas import GATEWAY, Server, ServingDirectory
from tasks.run_logger import run_logger
from tasks.steps import (
    REGISTRY_DELAYS_S,
    RunContext,
    StepRun,
    find_finished,
    find_output,
    perform,
    worth_retrying,
    write_event,
)
from tasks.tracking.protocol import ModelVersion, Point

_PROMPT_CHARACTERS = 60
# Seconds; a server answers, or says that it could not, within 30 s by default.
_SMOKE_TIMEOUT_S = 60.0
# Times the requests that a share of traffic needs on average: subjects are assigned by a hash.
_PATIENCE = 4


@dataclass(frozen=True)
class Release:
    """Registered version to serve, and the folder of its weights."""

    name: str
    version: int
    model_path: str

    @property
    def label(self) -> str:
        """Label of the version in answers."""
        return f"{self.name}-v{self.version}"


def _serving(context: RunContext) -> ServingDirectory:
    return ServingDirectory(context.config.runs_directory)


def _report(context: RunContext, line: str) -> None:
    run_logger().info(line)
    write_event(context.path, "deploy", "progress", line=line)


def _registered(context: RunContext, number: int | None, alias: str | None = None) -> ModelVersion:
    config = context.config.register_model
    tracker = context.tracker()
    if number is not None:
        found = tracker.registry.version(config.model_name, number=number)
    else:
        found = tracker.registry.version(config.model_name, alias=alias)
    if found is None:
        wanted = f"version {number}" if number is not None else f"version with the alias {alias!r}"
        raise MissingFileError(
            f"{config.model_name} has no {wanted} in the registry at {tracker.address}. "
            "Run the training flow first, or name a version that exists."
        )
    return found


def _chosen(context: RunContext) -> ModelVersion:
    """Version to serve when none was named: the one that this run registered, or the candidate when it registered none.

    Raises:
        ConfigError: it was judged worse than the champion, or this registry does not have the run's version.
    """
    config = context.config.register_model
    record = find_finished(context.path, "register")
    own = storage.read_json(record.outputs["register"]) if record is not None else {}
    if own.get("name") == config.model_name:
        found = _registered(context, own["version"])
        registry = context.tracker().address
        if own.get("identity") not in (None, found.tags.get("cherry.identity")):
            raise ConfigError(
                f"{found.name} version {found.version} in the registry at {registry} is not the one that "
                f"run {context.config.name} registered. Track where it was trained (tracking.uri), or name a version."
            )
    else:
        found = _registered(context, None, config.candidate_alias)
    if found.tags.get("verdict") == "worse":
        raise ConfigError(
            f"{found.name} version {found.version} was judged worse than {found.tags.get('compared_with')}. To serve "
            f"it anyway, name it: --model-version {found.version}."
        )
    return found


@task(
    name="resolve",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=REGISTRY_DELAYS_S,
    retry_condition_fn=worth_retrying,
)
def resolve_version(context: RunContext, number: int | None, alias: str | None = None) -> Release:
    """Release of the version with this number or alias, or of the run's own when neither is given.

    Raises:
        MissingFileError: no such version, or its weights are gone.
        ConfigError: the quantized weights may cost more than quantize.max_dnll, so they are not served; see `_chosen`.
    """
    named = number is not None or alias is not None
    found = _registered(context, number, alias) if named else _chosen(context)
    if context.config.deploy.artifact == "quantized":
        if found.tags.get("quantized_passed") == "false":
            raise ConfigError(
                f"{found.name} version {found.version}: its quantized weights did not pass: "
                f"{found.tags.get('quantized_reason', 'they cost more than quantize.max_dnll')}. Deploy the export "
                "(deploy.artifact=export), or raise the limit and run the training flow again."
            )
        path = find_output(found.tags["quantized_uri"], found.tags.get("quantize_fingerprint", ""))
    else:
        path = find_output(found.uri, found.tags.get("export_fingerprint", ""))
    if not storage.is_committed(path):
        raise MissingFileError(f"{found.name} version {found.version}: its weights are no longer at {path}")
    run_logger().info("%s version %d at %s", found.name, found.version, path)
    return Release(found.name, found.version, path)


@task(name="start", cache_policy=NO_CACHE)
def start(context: RunContext, release: Release) -> Server:
    """Healthy replica of the version, started unless it runs already."""
    serving, deploy = _serving(context), context.config.deploy
    serving.prepare()
    running = serving.find(release.label)
    if running is not None and (running.model, running.kind) == (release.model_path, deploy.replica_kind):
        run_logger().info("found running: %s at %s", running.name, running.url)
        return running
    _report(context, f"starting a replica of {release.label}")
    return serving.start_replica(
        release.label,
        deploy.replica_kind,
        model=release.model_path,
        version=release.label,
        config_path=f"{context.directory}/{RELEASE_CONFIG}",
        timeout_s=deploy.start_timeout_s,
    )


@task(name="smoke", cache_policy=NO_CACHE)
def smoke(context: RunContext, replica: Server) -> str:
    """Answer of the new replica to the smoke prompt, before any traffic; the replica is stopped when it fails."""
    serving, deploy = _serving(context), context.config.deploy
    try:
        engine = KINDS[replica.kind].connect(replica.url, str(serving.internal_key), replica.version)
        output = asyncio.run(_generate(engine, deploy.smoke_prompt, SamplingParams(max_tokens=deploy.smoke_max_tokens)))
        if not output:
            raise ServiceError(f"{replica.name} answered the smoke prompt {deploy.smoke_prompt!r} with nothing")
    except CherryError:
        if replica.name not in serving.weights():
            serving.stop(replica)
        raise
    _report(context, f"smoke: {deploy.smoke_prompt!r} -> {output[:_PROMPT_CHARACTERS]!r}")
    return output


async def _generate(engine: Engine, prompt: str, sampling: SamplingParams) -> str:
    """Text that an engine generates after a prompt."""
    await engine.start()
    try:
        async with asyncio.timeout(_SMOKE_TIMEOUT_S):
            return "".join([chunk.text async for chunk in engine.generate(Generation(prompt, sampling))])
    except TimeoutError as error:
        raise ServiceError(f"the replica gave no answer to the smoke prompt within {_SMOKE_TIMEOUT_S:g} s") from error
    finally:
        await engine.close()


@task(name="shift", cache_policy=NO_CACHE)
def shift(context: RunContext, replica: Server) -> dict[str, Any]:
    """Steps of shifting traffic to the replica, each checked with real requests; a breach is rolled back.

    Raises:
        ServiceError: the error rate of a step was above deploy.max_error_rate; traffic was rolled back.
    """
    serving, config = _serving(context), context.config.deploy
    before = {name: weight for name, weight in serving.weights().items() if weight > 0}
    others = {name: weight for name, weight in before.items() if name != replica.name}
    rows: list[dict[str, Any]] = []
    try:
        for percent in config.traffic_steps_percent if others else (100,):
            serving.write_routes(_shares(others, replica.name, float(percent)))
            gateway = _gateway(context)
            row = _probe(context, gateway, replica, percent)
            rows.append(row)
            failed = f"{row['errors']} of {row['requests']} requests failed"
            _report(context, f"{percent} % of traffic on {replica.name}: {failed}")
            if row["errors"] > config.max_error_rate * row["requests"]:
                raise ServiceError(
                    f"{replica.name}: {failed} at {percent} % of traffic (deploy.max_error_rate "
                    f"{config.max_error_rate}); traffic was rolled back"
                )
    except BaseException:
        _rollback(serving, before, replica)
        raise
    show_table(f"shift-{context.config.name}", rows, f"Traffic to {replica.name}")
    return {"steps": rows, "gateway": gateway.url, "replaced": sorted(others)}


def _shares(others: Mapping[str, float], name: str, percent: float) -> dict[str, float]:
    """Weights in percent: `percent` for `name`, the rest shared by the others in their former proportions."""
    total = sum(others.values())
    return {**{other: weight / total * (100.0 - percent) for other, weight in others.items()}, name: percent}


def _rollback(serving: ServingDirectory, before: Mapping[str, float], replica: Server) -> None:
    """Restore the traffic. A replica that had none is stopped; with no other, so is the gateway in front of it."""
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


def _gateway(context: RunContext) -> Server:
    """Running gateway, or a new one."""
    serving = _serving(context)
    running, port = serving.find(GATEWAY), context.config.serve.port
    if running is not None and (port == 0 or running.url.endswith(f":{port}")):
        return running
    if running is not None:
        serving.stop(running)  # it listens where this release is not wanted
    return serving.start_gateway(f"{context.directory}/{RELEASE_CONFIG}", context.config.deploy.start_timeout_s)


def _probe(context: RunContext, gateway: Server, replica: Server, percent: int) -> dict[str, Any]:
    """Counts and median latency of requests to the gateway, sent until enough have reached the new version.

    The gateway retries on another replica when one fails, so errors are those it counts for the version itself, and
    requests that no replica could answer.
    """
    serving, config = _serving(context), context.config.deploy
    key = read_key_file(str(serving.client_key))
    wanted, unanswered, latencies = config.requests_per_step, 0, list[float]()
    requests = errors = 0
    with Client(gateway.url, key) as client:
        before = _counts(client, replica.version)
        for number in range(_PATIENCE * wanted * 100 // percent):
            started = time.monotonic()
            try:
                client.infer(f"{config.smoke_prompt}f{percent}_{number}(", max_tokens=config.smoke_max_tokens)
            except CherryError as error:
                run_logger().warning("request failed: %s", error)
                unanswered += 1
            else:
                latencies.append(time.monotonic() - started)
            requests, errors = (new - old for new, old in zip(_counts(client, replica.version), before, strict=True))
            if requests >= wanted or unanswered >= wanted:
                break
    return {
        "percent": percent,
        "requests": requests,
        "errors": max(errors, unanswered),
        "median_ms": round(1000 * sorted(latencies)[len(latencies) // 2], 1) if latencies else None,
    }


def _counts(gateway: Client, version: str) -> tuple[int, int]:
    """Requests and errors of a version since the gateway started."""
    counted = gateway.routes()["versions"].get(version, {"requests": 0, "errors": 0})
    return counted["requests"], counted["errors"]


@task(
    name="record",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=REGISTRY_DELAYS_S,
    retry_condition_fn=worth_retrying,
)
def record(
    context: RunContext, release: Release, replica: Server, shifted: dict[str, Any], answer: str
) -> dict[str, Any]:
    """Summary of the release, recorded in MLflow and the run directory; the replicas it replaced are stopped."""
    serving = _serving(context)
    serving.write_routes({replica.name: 100.0})
    for name in shifted["replaced"]:
        old = serving.find(name)
        if old is not None:
            serving.stop(old)
    inputs = {
        "release": release.label,
        "model_path": release.model_path,
        "pid": replica.pid,
        "created": replica.created,
    }

    def work(step: StepRun) -> dict[str, str]:
        target = context.path / "deploy.json"
        state = {"release": release.label, "replica": replica.url, **shifted, "smoke": answer}
        storage.write_json(str(target), state)
        for number, row in enumerate(shifted["steps"]):
            now = int(time.time() * 1000)
            values = [
                Point(key, float(row[key]), number, now)
                for key in ("percent", "errors", "median_ms")
                if row[key] is not None
            ]
            step.tracker.points(step.run_id, values)
        step.tracker.artifact(step.run_id, target)
        found = _registered(context, release.version)
        context.tracker().registry.tag_version(
            found, {"deployed_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        )
        context.tracker().registry.set_alias(release.name, "serving", release.version)
        return {"deploy": str(target)}

    done = perform(context, "deploy", inputs, work, began=context.began)
    context.tracker().runs.log(context.parent_run_id, metrics={"seconds_deploy": done.seconds})
    return {"url": shifted["gateway"], "version": release.label, "key_file": str(serving.client_key)}
