"""Synchronous Python client of an Anything server; it needs no torch."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from anything.connections import FRESH_ONLY, send
from anything.keys import KEY_ENVIRONMENT
from anything.protocol import DEFAULT_MAX_TOKENS, SamplingParams
from anything.sse import EventReader
from base.errors import AuthenticationError, CherryError, ConfigError, RequestError, ServiceError

URL_ENVIRONMENT = "ANYTHING_URL"
DEFAULT_URL = "http://127.0.0.1:8080"
# A server answers or reports a timeout within 30 s by default; after twice that it counts as unreachable.
_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 5.0
# A server takes more tokens than this only as a stream.
_MAX_TOKENS_WITHOUT_STREAM = 2048


class Client:
    """API of a server for one key. Keeps connections open; may be used by several threads, and as a context manager.

    Every method raises AuthenticationError (the key is missing, wrong or revoked), RequestError (the request breaks a
    rule) or ServiceError (no answer, too late, overloaded, or a failure of the server's).
    """

    def __init__(self, base_url: str, api_key: str, *, timeout_s: float = _TIMEOUT_S) -> None:
        self.base_url = base_url.rstrip("/")
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        headers = {"authorization": f"Bearer {api_key}"}
        try:
            address = httpx.URL(self.base_url)
            if address.scheme not in ("http", "https") or not address.host:
                raise httpx.InvalidURL("it must read like http://127.0.0.1:8080")
            trust_env = not _is_this_machine(address.host)  # a proxy from the environment is for other machines
            self._http, self._fresh = (
                httpx.Client(
                    base_url=self.base_url, headers=headers, timeout=timeout, trust_env=trust_env, limits=limits
                )
                for limits in (httpx.Limits(max_connections=100, max_keepalive_connections=20), FRESH_ONLY)
            )
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise ConfigError(f"{base_url!r} or the API key cannot be used in a request: {error}") from error

    def __repr__(self) -> str:
        return f"Client({self.base_url!r})"

    def infer(
        self, prompt: str, *, max_tokens: int = DEFAULT_MAX_TOKENS, temperature: float = 0.0, seed: int | None = None
    ) -> str:
        """Generated text after `prompt`. Above 2048 tokens it is streamed, as the server requires.

        Args:
            seed: sampling seed: the same seed, prompt and model give the same text; `None` draws one.
        """
        if max_tokens > _MAX_TOKENS_WITHOUT_STREAM:
            return "".join(self.stream(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed))
        answer = self._ask("POST", "infer", _body(prompt, max_tokens, temperature, seed))
        if "output" not in answer:
            raise self._unexpected_answer(str(answer))
        return str(answer["output"])

    def routes(self) -> dict[str, Any]:
        """Replicas of a gateway, their shares, and each version's requests, errors and latencies."""
        return self._ask("GET", "routes")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._errors(), closing(self._send(method, path, body)) as response:
            response.read()
        if response.status_code != httpx.codes.OK:
            raise self._error(response)
        try:
            answer = response.json()
        except (ValueError, RecursionError) as error:
            raise self._unexpected_answer(response.text) from error
        if not isinstance(answer, dict):
            raise self._unexpected_answer(response.text)
        return answer

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        try:
            return send(self._http, self._fresh, method, f"/v1/anything/{path}", body)
        except ValueError as error:  # of JSON, before anything is sent
            raise RequestError(f"the request holds a value that JSON has not: {error}") from error

    def _unexpected_answer(self, text: str) -> ServiceError:
        return ServiceError(f"{self.base_url} did not answer as an Anything server: {text[:80]!r}")

    def stream(
        self, prompt: str, *, max_tokens: int = DEFAULT_MAX_TOKENS, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[str]:
        """Text chunk by chunk; see `infer`. Closing the iterator cancels the generation."""
        body = {**_body(prompt, max_tokens, temperature, seed), "stream": True}
        reader = EventReader()
        with self._errors(), closing(self._send("POST", "infer", body)) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                raise self._error(response)
            for event in (event for received in response.iter_bytes() for event in reader.feed(received)):
                if "error" in event:
                    raise ServiceError(f"the answer broke off: {_message(event)}")
                yield str(event.get("text", ""))
        if not reader.done:
            raise ServiceError(f"{self.base_url} broke off in the middle of an answer. Ask again.")

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._fresh.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise ServiceError(
                f"nothing answers at {self.base_url} ({error}). Is the server running? Start one with `anything serve`."
            ) from error
        except httpx.TimeoutException as error:
            raise ServiceError(f"{self.base_url} did not answer in time ({type(error).__name__}).") from error
        except httpx.HTTPError as error:
            raise ServiceError(f"{self.base_url} failed: {type(error).__name__}: {error}") from error

    def _error(self, response: httpx.Response) -> CherryError:
        status = response.status_code
        try:
            message = _message(response.json())
        except (ValueError, RecursionError):
            message = response.text[:200]
        text = f"{self.base_url} answered {status}: {message}"
        if status in (401, 403):
            return AuthenticationError(text)
        if status in (408, 429) or status >= 500:
            return ServiceError(text)
        return RequestError(text)


def infer(
    prompt: str, *, max_tokens: int = DEFAULT_MAX_TOKENS, temperature: float = 0.0, seed: int | None = None
) -> str:
    """Text from the server at ANYTHING_URL (else the local default), with the key in ANYTHING_API_KEY; see `Client`."""
    with client_from_environment() as client:
        return client.infer(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)


def _body(prompt: str, max_tokens: int, temperature: float, seed: int | None) -> dict[str, Any]:
    # Not validated here: the server says which rule a value breaks.
    sampling = SamplingParams.model_construct(max_tokens=max_tokens, temperature=temperature, seed=seed)
    return {"prompt": prompt, **sampling.as_body()}


def client_from_environment(url: str | None = None) -> Client:
    """Client for `url`, else ANYTHING_URL, else the local default.

    Raises:
        AuthenticationError: ANYTHING_API_KEY is not set.
    """
    key = os.environ.get(KEY_ENVIRONMENT)
    if not key:
        raise AuthenticationError(f"no API key: set {KEY_ENVIRONMENT} to a key of the server.")
    return Client(url or os.environ.get(URL_ENVIRONMENT) or DEFAULT_URL, key)


def _message(answer: Any) -> str:
    try:
        return str(answer["error"]["message"])
    except (KeyError, TypeError):
        return str(answer)[:200]


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
