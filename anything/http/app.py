"""HTTP API of a server: authorization, request and response schemas, streaming, errors, readiness and draining."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from anything.http.errors import api_error, error_body, error_response, failed, no_route
from anything.http.page import page
from anything.http.request import Call, DisconnectedError
from anything.keys import KeyRecord, KeyStore
from anything.prometheus import ServerMetrics
from anything.protocol import Chunk, Deadline, Engine, Generation, RefusedError, SamplingParams, UnavailableError
from anything.serve_config import ServeConfig
from anything.sse import DONE, event, json_bytes
from base.errors import AuthenticationError

logger = logging.getLogger(__name__)

VERSION_HEADER = "x-anything-version"
SUBJECT_HEADER = "x-subject"
# Seconds until a client may ask a draining server again: another one has taken over by then.
_DRAIN_RETRY_AFTER_S = 5
# What `/` answers, before the models.
_INDEX = {
    "name": "Anything",
    "infer": "POST /v1/anything/infer",
    "routes": "GET /v1/anything/routes",
    "health": "GET /healthz",
    "ready": "GET /readyz",
    "metrics": "GET /metrics",
    "schema": "GET /openapi.json",
}
# Seconds for interrupted requests to send their clients an error.
_INTERRUPT_TIMEOUT_S = 1.0


class InferRequest(SamplingParams):
    """Body of POST /v1/anything/infer. An unknown key is refused; null for an optional one is its default."""

    prompt: Annotated[str, Field(min_length=1)]
    stream: bool = False

    @property
    def sampling(self) -> SamplingParams:
        """Sampling fields of the request, without the prompt and `stream`."""
        return SamplingParams(**{name: getattr(self, name) for name in SamplingParams.model_fields})


class Gateway:
    """State of one server: its engine, its keys, the requests in flight, and whether it drains."""

    def __init__(self, engine: Engine, config: ServeConfig, keys: KeyStore) -> None:
        self.engine = engine
        self.config = config
        self.keys = keys
        self.metrics = ServerMetrics()
        self.draining = False
        self._calls: set[Call] = set()
        self._started = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """Number of requests admitted and not answered yet."""
        return len(self._calls)

    async def start(self) -> None:
        """Start the engine; the server is not ready before this returns."""
        await self.engine.start()
        self._started = True

    async def ready(self) -> bool:
        """Whether the engine is loaded and this server admits requests."""
        return self._started and not self.draining and await self.engine.ready()

    async def drain(self) -> None:
        """Stop admitting, let requests in flight finish until shutdown_timeout_s, then cancel the rest."""
        self.draining = True
        if self._calls:
            logger.info("draining: %d requests in flight, %g s", len(self._calls), self.config.shutdown_timeout_s)
        try:
            await asyncio.wait_for(self._idle.wait(), self.config.shutdown_timeout_s)
        except TimeoutError:
            self.interrupt_all()
            # A client that does not read its answer cannot hold the server.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), _INTERRUPT_TIMEOUT_S)

    def interrupt_all(self) -> None:
        """End every request in flight with a 503."""
        for call in list(self._calls):
            call.interrupt(_draining_error())

    async def infer(self, request: Request) -> Response:
        """Response to POST /v1/anything/infer."""
        key = self.authorize(request)
        if self.draining:
            raise _draining_error()
        if not self._started:
            raise UnavailableError("the model is still loading", status=503, code="loading", retry_after_s=1)
        deadline = Deadline(self.config.timeout_s)
        call = Call(deadline)
        # In flight from here on: a drain waits for bodies that are still arriving, too, and answers their senders.
        self._calls.add(call)
        self._idle.clear()
        try:
            return await self._answer(call, request, key, deadline)
        except BaseException:
            await self._finish(call)
            raise

    async def _answer(self, call: Call, request: Request, key: KeyRecord, deadline: Deadline) -> Response:
        """Response to one request; `call` is finished once the response is sent."""
        started = time.monotonic()
        body = _parse(await call.read_body(request, self.config.max_request_bytes))
        if self.draining:
            raise _draining_error()
        if body.max_tokens > self.config.max_tokens_without_stream and not body.stream:
            raise RefusedError(
                f"max_tokens: more than {self.config.max_tokens_without_stream} tokens need stream: true "
                f"(got {body.max_tokens} without it)"
            )
        generation = Generation(
            prompt=body.prompt,
            sampling=body.sampling,
            subject=request.headers.get(SUBJECT_HEADER) or f"{key.key_id}/{body.prompt}",
            deadline=deadline,
        )
        call.begin(self.engine, generation)
        call.watch(request)

        def record(chunk: Chunk) -> None:
            self.metrics.latency.observe(time.monotonic() - started)
            if chunk.usage is not None:
                self.metrics.prompt_tokens.inc(chunk.usage.prompt_tokens)
                self.metrics.completion_tokens.inc(chunk.usage.completion_tokens)

        if body.stream:
            return EventStream(call, await call.next(), deadline, record, lambda: self._finish(call))
        response = await _complete_answer(call, record)
        await self._finish(call)
        return response

    async def routes(self, request: Request) -> Response:
        """Response to GET /v1/anything/routes."""
        self.authorize(request)
        routes = (await self.engine.status()).routes
        if routes is None:
            text = "this server has a model of its own and no routes. Ask the gateway that was started with --routes."
            raise RefusedError(text, status=404, code="no_routes")
        return JSONResponse(routes)

    async def exposition(self) -> str:
        """Metrics of this server and its engine in Prometheus' text format."""
        status = await self.engine.status()
        gauges = {**status.gauges, "in_flight": self.in_flight, "draining": self.draining}
        return self.metrics.exposition(replace(status, gauges=gauges))

    async def _finish(self, call: Call) -> None:
        try:
            await call.close()
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    def authorize(self, request: Request) -> KeyRecord:
        """Record of the key in a request's bearer token.

        Raises:
            AuthenticationError: no token, or not a key of this server (401).
            RefusedError: the key is revoked (403).
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise AuthenticationError("a bearer token is needed: send the header `Authorization: Bearer <key>`.")
        key = self.keys.find(token.strip())
        if key.revoked:
            raise RefusedError(f"the key {key.key_id} is revoked", status=403, code="key_revoked")
        return key


class EventStream(Response):
    """Streamed response: one event per chunk, the last one with finish_reason and usage, then [DONE].

    A client that reads nothing for the deadline's whole time counts as disconnected.
    """

    def __init__(
        self,
        call: Call,
        first: Chunk,
        deadline: Deadline,
        record: Callable[[Chunk], None],
        finish: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self.headers[VERSION_HEADER] = first.version
        self.headers["cache-control"] = "no-store"
        del self.headers["content-length"]
        self._call, self._first, self._deadline = call, first, deadline
        self._record, self._finish = record, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; an error after the first byte is an `error` event without [DONE]."""

        async def write(data: bytes, *, more: bool = True) -> None:
            async with asyncio.timeout(self._deadline.timeout_s):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for data in self._events():
                    await write(data)
                    self._deadline.restart()
            except TimeoutError:
                raise
            except Exception as error:
                failure = api_error(error)
                if not isinstance(failure, DisconnectedError):
                    await write(event(error_body(failure)))
            await write(b"", more=False)
        except TimeoutError:
            logger.info("a client stopped reading its stream; its generation was cancelled")
        finally:
            await self._finish()

    async def _events(self) -> AsyncIterator[bytes]:
        chunk = self._first
        while chunk.finish_reason is None:
            yield event({"text": chunk.text})
            chunk = await self._call.next()
        yield event({"text": chunk.text, "finish_reason": chunk.finish_reason, **_usage(chunk)})
        self._record(chunk)
        yield DONE


async def _complete_answer(call: Call, record: Callable[[Chunk], None]) -> Response:
    texts: list[str] = []
    async for chunk in call.chunks():
        texts.append(chunk.text)
    record(chunk)
    content = {"output": "".join(texts), "finish_reason": chunk.finish_reason, "model": chunk.version, **_usage(chunk)}
    return Response(json_bytes(content), media_type="application/json", headers={VERSION_HEADER: chunk.version})


def _usage(chunk: Chunk) -> dict[str, Any]:
    return {} if chunk.usage is None else {"usage": vars(chunk.usage)}


def _parse(body: bytes) -> InferRequest:
    try:
        return InferRequest.model_validate_json(body)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise RefusedError("; ".join(problems)) from None


def _draining_error() -> UnavailableError:
    text = "the server is shutting down; try again, another one may answer"
    return UnavailableError(text, status=503, code="draining", retry_after_s=_DRAIN_RETRY_AFTER_S)


def create_app(engine: Engine, config: ServeConfig, keys: KeyStore) -> FastAPI:
    """Application of one server. Its runner awaits `app.state.gateway.start()` (see anything.http.serve).

    Must be called on a running event loop's thread or before it starts; the engine is closed when the app ends.
    """
    gateway = Gateway(engine, config, keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await engine.close()

    app = FastAPI(title="Anything", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.gateway = gateway
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(Exception, failed)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", SUBJECT_HEADER],
            expose_headers=[VERSION_HEADER, "retry-after"],
        )
    _add_routes(app, gateway)
    return app


def _add_routes(app: FastAPI, gateway: Gateway) -> None:
    read = ["GET", "HEAD"]
    schema = {"content": {"application/json": {"schema": InferRequest.model_json_schema()}}, "required": True}

    @app.post("/v1/anything/infer", openapi_extra={"requestBody": schema})
    async def infer(request: Request) -> Response:
        return await _answer(gateway, request, gateway.infer)

    @app.api_route("/v1/anything/routes", methods=read)
    async def routes(request: Request) -> Response:
        return await _answer(gateway, request, gateway.routes)

    @app.api_route("/", methods=read)
    async def index(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return page()
        return JSONResponse({**_INDEX, "models": (await gateway.engine.status()).versions})

    @app.api_route("/healthz", methods=read)
    async def healthz() -> Response:
        failure = (await gateway.engine.status()).failure
        if failure is not None:
            return JSONResponse({"status": "failed", "reason": failure}, 503)
        return JSONResponse({"status": "alive"})

    @app.api_route("/readyz", methods=read)
    async def readyz() -> Response:
        ready = await gateway.ready()
        status = "ready" if ready else "draining" if gateway.draining else "not ready"
        return JSONResponse({"status": status}, 200 if ready else 503)

    @app.api_route("/metrics", methods=read)
    async def metrics() -> Response:
        return PlainTextResponse(await gateway.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _answer(gateway: Gateway, request: Request, work: Callable[[Request], Awaitable[Response]]) -> Response:
    """Response of `work`, or of the error that it raised; counted either way."""
    try:
        response = await work(request)
    except Exception as error:
        failure = api_error(error)
        if isinstance(failure, DisconnectedError):
            gateway.metrics.disconnects.inc()
        response = error_response(failure)
    gateway.metrics.responses.labels(str(response.status_code)).inc()
    return response
