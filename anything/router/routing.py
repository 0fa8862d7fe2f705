"""Owns which replica answers a request: weights, sticky subjects, one retry, and what happened to each version.

It knows nothing of HTTP: a replica is an engine. `routes.json` is written whole by whoever deploys.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from anything.prometheus import VersionStats
from anything.protocol import Chunk, Engine, Generation, UnavailableError
from anything.router.remote_engine import RemoteEngine
from base.config import Problem, Section, validate
from base.errors import CherryError, ConfigError, MissingFileError

logger = logging.getLogger(__name__)

# The first choice, and one more when that fails before a byte was sent.
_ATTEMPTS = 2
# What another replica may mend: this one failed, or is draining. Not its load (429) nor the time that is up (504).
_RETRIED_STATUSES = (502, 503)


class ReplicaRoute(Section):
    """One replica in routes.json."""

    name: str = Field(min_length=1)
    version: str = Field(min_length=1)
    url: str = Field(pattern=r"^https?://")
    weight_percent: float = Field(ge=0.0, le=100.0)
    """0 keeps a replica known, for a roll-back, without traffic."""
    api_key_file: str


class Routes(Section):
    """The whole of routes.json."""

    salt: str = ""
    """Another salt deals subjects out anew: one per experiment."""
    replicas: tuple[ReplicaRoute, ...]

    def problems(self) -> Iterator[Problem]:
        """Names must be unique, and the weights 100 % together."""
        names = [replica.name for replica in self.replicas]
        if len(set(names)) < len(names):
            yield Problem("replicas", "each name may be given once", names)
        total = sum(replica.weight_percent for replica in self.replicas)
        if not math.isclose(total, 100.0, abs_tol=0.01):
            weights = {replica.name: replica.weight_percent for replica in self.replicas}
            yield Problem("replicas", f"the weights must add up to 100 percent, not {total:g}", weights)

    def ranked(self, subject: str) -> list[ReplicaRoute]:
        """The replicas that have a weight, best first for this subject.

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
    """Read and check routes.json.

    Raises:
        MissingFileError: no file at `path`.
        ConfigError: it is not JSON, or breaks a rule.
    """
    try:
        with open(path, encoding="utf-8") as handle:
            raw = json.load(handle)
    except FileNotFoundError as error:
        raise MissingFileError(f"no routes at {path}. A deploy writes them; see docs/runbook.md.") from error
    except (ValueError, OSError) as error:
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
    return RemoteEngine(route.url, route.api_key_file, route.version)


class Router:
    """An engine that is many replicas behind routes.json, which it reads again when the file was replaced.

    A new file that is wrong changes nothing: the routes before it stay, and `describe` tells the error.
    """

    def __init__(self, path: str, connect: Callable[[ReplicaRoute], Engine] = _connect) -> None:
        self.versions: dict[str, VersionStats] = {}
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
        """The chunks of the replica that the subject is routed to, or of the next one when that failed at once.

        Raises:
            UnavailableError: both attempts failed (502 or 503), or the replica is overloaded (429).
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
                if began or attempt == len(routes) or error.status not in _RETRIED_STATUSES:
                    raise
                logger.warning("replica %s failed, asking another one: %s", route.name, error)

    async def _ask(self, replica: _Replica, generation: Generation) -> AsyncGenerator[Chunk]:
        """One attempt, with its outcome counted for the replica's version."""
        stats = self.versions.setdefault(replica.route.version, VersionStats())
        stats.requests += 1
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
                stats.errors += 1
            elif not finished:
                stats.cancelled += 1
            raise
        except UnavailableError as error:
            # Load that was refused is no fault of the version.
            stats.errors += error.status != 429
            raise
        finally:
            await replica.release()

    async def refresh(self) -> None:
        """Read routes.json again if it was replaced since."""
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
                logger.error("kept the routes as they were: %s", error)

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

    def gauges(self) -> Mapping[str, float]:
        """Replicas with and without weight."""
        return {
            "replicas": len(self._replicas),
            "replicas_with_weight": sum(r.route.weight_percent > 0 for r in self._replicas.values()),
            "routes_rejected": self._reload_error is not None,
        }

    def describe(self) -> dict[str, Any]:
        """The routes in force and what happened to each version, as JSON."""
        shown = {"name", "version", "url", "weight_percent"}
        return {
            "salt": self._routes.salt,
            "replicas": [route.model_dump(include=shown) for route in self._routes.replicas],
            "versions": {version: stats.describe() for version, stats in self.versions.items()},
            "rejected": self._reload_error,
        }

    async def close(self) -> None:
        """Close the connections to every replica."""
        for replica in self._replicas.values():
            await replica.engine.close()


def _same_server(old: ReplicaRoute, new: ReplicaRoute) -> bool:
    return (old.url, old.version, old.api_key_file) == (new.url, new.version, new.api_key_file)


def _identity(path: str) -> tuple[int, int, int] | None:
    """What changes when a file is replaced, even by one of the same size in the same instant."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
