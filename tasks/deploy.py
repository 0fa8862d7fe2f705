"""Deployment of a registered version: its replica, a smoke test, traffic shifted in steps, and the record of it.

Server processes are in tasks/processes/replicas.py, the choice of the version and the traffic in tasks/release.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE

from anything.protocol import Engine, Generation, SamplingParams
from anything.router.kinds import KINDS
from base import storage
from base.errors import CherryError, OperationalError, ServiceError
from tasks.files.file_lock import try_lock
from tasks.lifecycle import RELEASE_CONFIG, open_release
from tasks.processes.replicas import Server, ServingDirectory
from tasks.records.figures import seconds_of
from tasks.release.choice import Release, choose, registered
from tasks.release.room import check_room
from tasks.release.traffic import running_step, shift_traffic
from tasks.run_config import SERVING_ALIAS
from tasks.run_logger import run_logger
from tasks.steps import REGISTRY_DELAYS_S, RunContext, opened_step, read_record, step_file, worth_retrying

_PROMPT_CHARACTERS = 60
# Seconds; a server answers, or says that it could not, within 30 s by default.
_SMOKE_TIMEOUT_S = 60.0


def _serving(context: RunContext) -> ServingDirectory:
    return ServingDirectory(context.config.runs_directory)


@task(
    name="resolve",
    task_run_name="resolve",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=REGISTRY_DELAYS_S,
    retry_condition_fn=worth_retrying,
)
def resolve_version(context: RunContext, number: int | None, alias: str | None = None) -> Release:
    """Release of the version with this number or alias, or of the run's own; see `choose`."""
    release = choose(context, number, alias)
    run_logger().info("%s version %d at %s", release.name, release.version, release.model_path)
    return release


@contextmanager
def releasing(context: RunContext, release: Release) -> Iterator[tuple[RunContext, Release]]:
    """Context of a release that has begun, with its run directory and its run in the tracker.

    Each attempt is a run of its own, which ends with the attempt's error; one that Prefect starts again goes on in it.

    Raises:
        OperationalError: another process is releasing in the same runs directory, or memory is short.
    """
    serving = _serving(context)
    check_room(context.config, release)
    serving.prepare()
    attempt = str(runtime.flow_run.id or context.began)
    with try_lock(serving.path / "release.lock") as is_free:
        if not is_free:
            raise OperationalError(f"another release is under way in {serving.path}. Wait until it has ended.")
        with open_release(context) as opened:
            inputs = {"release": release.label, "model_path": release.model_path}
            identity = storage.fingerprint([inputs, attempt])
            with opened_step(opened, "deploy", inputs, identity) as step:
                for line in (release.story, f"replaces {release.replaces}" if release.replaces else ""):
                    if line:
                        step.say(line, lasting=True)
                yield opened, replace(release, run_id=step.run_id)
                step.outputs = {"deploy": str(opened.path / "deploy.json")}
            seconds = read_record(step_file(opened.path, "deploy")).seconds
            opened.tracker().runs.log(opened.parent_run_id, metrics={seconds_of("deploy"): seconds})


@task(name="start", task_run_name="start", cache_policy=NO_CACHE)
def start(context: RunContext, release: Release) -> Server:
    """Healthy replica of the version, started unless it runs already."""
    serving, deploy = _serving(context), context.config.deploy
    serving.prepare()
    running = serving.find_replica(release.label, release.model_path, deploy.replica_kind)
    if running is not None:
        run_logger().info("found running: %s at %s", running.name, running.url)
        return running
    running_step(context, release).say(f"starting a replica of {release.label}")
    return serving.start_replica(
        serving.unused_name(release.label),
        deploy.replica_kind,
        model=release.model_path,
        version=release.label,
        config_path=f"{context.directory}/{RELEASE_CONFIG}",
        timeout_s=deploy.start_timeout_s,
    )


@task(name="smoke", task_run_name="smoke", cache_policy=NO_CACHE)
def smoke(context: RunContext, release: Release, replica: Server) -> str:
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
    running_step(context, release).say(f"smoke: {deploy.smoke_prompt!r} -> {output[:_PROMPT_CHARACTERS]!r}")
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


@task(name="shift", task_run_name="shift", cache_policy=NO_CACHE)
def shift(context: RunContext, release: Release, replica: Server) -> dict[str, Any]:
    """Steps of shifting traffic to the replica, each checked with real requests; see `shift_traffic`."""
    return shift_traffic(context, release, replica)


@task(
    name="record",
    task_run_name="record",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=REGISTRY_DELAYS_S,
    retry_condition_fn=worth_retrying,
)
def record(
    context: RunContext, release: Release, replica: Server, shifted: dict[str, Any], answer: str
) -> dict[str, Any]:
    """Summary of the release, recorded in the tracker and the run directory; the replicas it replaced are stopped."""
    serving = _serving(context)
    serving.write_routes({replica.name: 100.0})
    for name in shifted["replaced"]:
        old = serving.find(name)
        if old is not None:
            serving.stop(old)
    target = context.path / "deploy.json"
    state = {"release": release.label, "replica": replica.url, **shifted, "smoke": answer}
    storage.write_json(str(target), state)
    tracker = context.tracker()
    tracker.runs.artifact(release.run_id, target)
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    tracker.registry.annotate(registered(context, release.version), tags={"deployed_at": when})
    tracker.registry.set_alias(release.name, SERVING_ALIAS, release.version)
    return {"url": shifted["gateway"], "version": release.label, "key_file": str(serving.client_key)}
