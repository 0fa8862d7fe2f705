"""Errors as HTTP: the API's one shape {"error": {"code", "message"}}, also for unknown paths and for bugs."""

from __future__ import annotations

import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from anything.protocol import RefusedError, UnavailableError
from base.errors import AuthenticationError, CherryError, RequestError, ServiceError

logger = logging.getLogger(__name__)


def api_error(error: Exception) -> CherryError:
    """The error itself if it is one of the API's, else one that says no more than that the server failed."""
    if isinstance(error, RequestError | ServiceError | AuthenticationError):
        return error
    logger.error("a request failed: %s", type(error).__name__, exc_info=error)
    return UnavailableError("the server failed on this request; its log has the cause.", status=500, code="internal")


def error_body(error: CherryError) -> dict[str, Any]:
    """JSON of an error: {"error": {"code", "message"}}."""
    code = getattr(error, "code", "authentication" if isinstance(error, AuthenticationError) else "error")
    return {"error": {"code": code, "message": str(error)}}


def error_response(error: CherryError) -> Response:
    """Response to a request that failed before the first byte."""
    if isinstance(error, AuthenticationError):
        return JSONResponse(error_body(error), 401, headers={"www-authenticate": "Bearer"})
    status = getattr(error, "status", 422 if isinstance(error, RequestError) else 503)
    retry_after_s = getattr(error, "retry_after_s", None)
    headers = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}
    if status in (408, 413) or getattr(error, "code", "") == "draining":
        # The body may still be arriving, or the server is about to end: the connection cannot be used again.
        headers["connection"] = "close"
    return JSONResponse(error_body(error), status, headers=headers)


async def no_route(request: Request, error: Exception) -> Response:
    """Response to an unknown path or a wrong method, in the API's shape."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        text, code = f"{request.url.path}: there is no such path. GET / lists what there is.", "not_found"
    elif error.status_code == 405:
        allowed = headers.get("allow", "other methods")
        text, code = f"{request.url.path} takes {allowed}, not {request.method}.", "method_not_allowed"
    else:
        text, code = str(error.detail), "error"
    return JSONResponse(error_body(RefusedError(text, code=code)), error.status_code, headers=headers)


async def failed(_: Request, error: Exception) -> Response:
    """Response to a request that ran into a bug."""
    return error_response(api_error(error))
