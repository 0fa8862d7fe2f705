"""Router: weighted, sticky routing over replicas, with one retry and metrics of each version.

A replica is any engine. `routes.json` is written atomically by a deployment, and read again when it was replaced.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass

from pydantic import Field

from anything.prometheus import VersionMetrics
from anything.protocol import Chunk, Engine, EngineStatus, Generation, RefusedError, UnavailableError
from anything.router.kinds import DEFAULT_KIND, KINDS, kind_rule
from base.config import Problem, Section, validate
from base.errors import CherryError, ConfigError, MissingFileError

logger = logging.getLogger(__name__)

# The first choice, and one retry when that was not reached or refused before any work. A request on which a replica
# failed is never handed to the next one, which it would break as well.
_ATTEMPTS = 2


class ReplicaRoute(Section):
    """One replica in routes.json."""

    name: str = Field(min_length=1)
    kind: str = DEFAULT_KIND
    """One of `anything.router.kinds.KINDS`."""
    version: str = Field(min_length=1)
    url: str = Field(pattern=r"^https?://")
    weight_percent: float = Field(ge=0.0, le=100.0)
    """0 keeps a replica without traffic, for a rollback."""
    api_key_file: str


class Routes(Section):
    """Content of routes.json."""

    salt: str = ""
    """Salt of the hash: another one assigns subjects anew, for another experiment."""
    replicas: tuple[ReplicaRoute, ...]

    def problems(self) -> Iterator[Problem]:
        """Names must be unique, kinds registered, and weights must add up to 100 %."""
        for number, replica in enumerate(self.replicas):
            if replica.kind not in KINDS:
                yield Problem(f"replicas.{number}.kind", kind_rule(), replica.kind)
        names = [replica.name for replica in self.replicas]
        if len(set(names)) < len(names):
            yield Problem("replicas", "each name may be given once", names)
        total = sum(replica.weight_percent for replica in self.replicas)
        if not math.isclose(total, 100.0, abs_tol=0.01):
            weights = {replica.name: replica.weight_percent for replica in self.replicas}
            yield Problem("replicas", f"the weights must add up to 100 percent, not {total:g}", weights)

    def ranked(self, subject: str) -> list[ReplicaRoute]:
        """Replicas with a weight, in order of preference for this subject.

        Weighted rendezvous hashing: the first choice follows the weights over many subjects, a subject keeps it
        while the weights stay, and raising one weight moves subjects to that replica only.
        """
        return sorted((r for r in self.replicas if r.weight_percent > 0), key=lambda r: self._cost(subject, r))

    def _cost(self, subject: str, replica: ReplicaRoute) -> float:
        text = json.dumps([self.salt, subject, replica.name])
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        uniform = (number + 0.5) / 2**64
        return -math.log(uniform) / replica.weight_percent


def read_routes(path: str) -> Routes:
    """Content of routes.json, validated.

    Raises:
        MissingFileError: no file at `path`.
        ConfigError: it is not JSON, or breaks a rule.
    """
    try:
        with open(path, encoding="utf-8") as handle:
            raw = json.load(handle)
    except FileNotFoundError as error:
        raise MissingFileError(f"no routes at {path}. A deploy writes them; see docs/runbook.md.") from error
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be an object with salt and replicas, got {type(raw).__name__}")
    return validate(raw, Routes, origin=path)


@dataclass(eq=False)
class _Replica:
    route: ReplicaRoute
    engine: Engine
    active: int = 0
    retired: bool = False

    async def release(self) -> None:
        self.active -= 1
        await self.close_if_idle()

    async def close_if_idle(self) -> None:
        if self.retired and not self.active:
            await self.engine.close()


def _connect(route: ReplicaRoute) -> Engine:
    return KINDS[route.kind].connect(route.url, route.api_key_file, route.version)


class Router:
    """Engine over the replicas in routes.json, which is read again when the file was replaced.

    An invalid new file changes nothing: the routes before it stay, and `status` has the error.
    """

    def __init__(self, path: str, connect: Callable[[ReplicaRoute], Engine] = _connect) -> None:
        self._versions = VersionMetrics()
        self._path = path
        self._connect = connect
        self._routes = Routes.model_construct(salt="", replicas=())
        self._replicas: dict[str, _Replica] = {}
        self._seen: tuple[int, int, int] | None = None
        self._reload_error: str | None = None
        self._reload = asyncio.Lock()

    async def start(self) -> None:
        """Read the routes for the first time.

        Raises:
            MissingFileError, ConfigError: see `read_routes`.
        """
        self._seen = _identity(self._path)
        await self._apply(read_routes(self._path))

    async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        """Chunks of the replica that the subject is routed to, or of the next one when that did not take the request.

        Raises:
            GenerationError: the replica failed on this request (500).
            UnavailableError: the replica failed, or no replica took the request (502 or 503), or is overloaded (429).
            RefusedError: the replica refused the request.
        """
        await self.refresh()
        routes = self._routes.ranked(generation.subject)[:_ATTEMPTS]
        if not routes:
            raise UnavailableError("no replica has a weight", status=503, code="no_replica")
        for attempt, route in enumerate(routes, start=1):
            began = False
            try:
                async with aclosing(self._ask(self._replicas[route.name], generation)) as chunks:
                    async for chunk in chunks:
                        began = True
                        yield chunk
                return
            except UnavailableError as error:
                if began or attempt == len(routes) or not error.worth_another_replica:
                    raise
                logger.warning("replica %s failed, asking another one: %s", route.name, error)

    async def _ask(self, replica: _Replica, generation: Generation) -> AsyncGenerator[Chunk]:
        """Chunks of one attempt, counted in the metrics of the replica's version."""
        stats = self._versions.of(replica.route.version)
        stats.requests.inc()
        replica.active += 1
        started = time.monotonic()
        first = finished = False
        try:
            async for chunk in replica.engine.generate(generation):
                if not first:
                    first = True
                    stats.first_token.observe(time.monotonic() - started)
                if chunk.finish_reason is not None:
                    finished = True
                    stats.latency.observe(time.monotonic() - started)
                yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            if generation.deadline is not None and generation.deadline.expired:
                stats.fail(f"no answer within {generation.deadline.timeout_s:g} s")
            elif not finished:
                stats.cancelled.inc()
            raise
        except RefusedError:
            raise
        except Exception as error:
            # An overloaded version has not failed.
            if getattr(error, "status", None) != 429:
                stats.fail(str(error) or type(error).__name__)
            raise
        finally:
            await replica.release()

    async def refresh(self) -> None:
        """Read routes.json again if it was replaced since the last time."""
        async with self._reload:
            seen = _identity(self._path)
            if seen == self._seen:
                return
            self._seen = seen
            try:
                await self._apply(read_routes(self._path))
                self._reload_error = None
            except CherryError as error:
                self._reload_error = str(error)
                logger.error("kept the current routes: %s", error)

    async def _apply(self, routes: Routes) -> None:
        replicas: dict[str, _Replica] = {}
        for route in routes.replicas:
            known = self._replicas.get(route.name)
            if known is not None and _same_server(known.route, route):
                known.route = route
                replicas[route.name] = known
            else:
                engine = self._connect(route)
                await engine.start()
                replicas[route.name] = _Replica(route, engine)
        gone = [replica for replica in self._replicas.values() if replica not in replicas.values()]
        self._routes, self._replicas = routes, replicas
        for replica in gone:
            replica.retired = True
            await replica.close_if_idle()
        logger.info("routes: %s", {route.name: route.weight_percent for route in routes.replicas})

    async def ready(self) -> bool:
        """Whether a replica that has a weight is ready."""
        await self.refresh()
        live = [r.engine.ready() for r in self._replicas.values() if r.route.weight_percent > 0]
        return any(await asyncio.gather(*live))

    async def status(self) -> EngineStatus:
        """Replica counts, metrics of each version, and the routes in force."""
        await self.refresh()
        gauges = {
            "replicas": len(self._replicas),
            "replicas_with_weight": sum(r.route.weight_percent > 0 for r in self._replicas.values()),
            "routes_rejected": self._reload_error is not None,
        }
        shown = {"name", "kind", "version", "url", "weight_percent"}
        routes = {
            "salt": self._routes.salt,
            "replicas": [route.model_dump(include=shown) for route in self._routes.replicas],
            "versions": self._versions.describe(),
            "rejected": self._reload_error,
        }
        versions = sorted({route.version for route in self._routes.replicas if route.weight_percent > 0})
        return EngineStatus(gauges, self._versions.registry, routes, tuple(versions))

    async def close(self) -> None:
        """Close the connections to every replica."""
        for replica in self._replicas.values():
            await replica.engine.close()


def _same_server(old: ReplicaRoute, new: ReplicaRoute) -> bool:
    shared = ("kind", "url", "version", "api_key_file")
    return all(getattr(old, name) == getattr(new, name) for name in shared)


def _identity(path: str) -> tuple[int, int, int] | None:
    """Identity of a file that changes when it is replaced, even by one of the same size in the same instant."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
