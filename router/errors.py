"""The errors that clients see, in the shape of the OpenAI API.

Every message is written here or by the code that refuses the request; nothing of an exception's
own text reaches a client. Exceptions that nobody expected become a 500 and go to the log.
"""

import logging
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pagewire.router.request import RequestFailed

logger = logging.getLogger(__name__)


class ClientGone(Exception):
    """Nobody reads the response any more; there is nobody to tell."""


def invalid(
    message: str,
    *,
    param: str | None,
    code: str = "invalid_value",
    status: int = 400,
    details: dict[str, int] | None = None,
) -> RequestFailed:
    """A request that cannot be served however often it is repeated."""
    return RequestFailed(
        message,
        status=status,
        kind="invalid_request_error",
        code=code,
        param=param,
        details=details,
    )


def internal() -> RequestFailed:
    """A fault of ours, without a word about its cause."""
    return RequestFailed(
        "The server met an internal error; the log of the router has the cause.",
        status=500,
        kind="server_error",
        code="internal_error",
    )


def as_failure(error: Exception) -> RequestFailed:
    """What a client is told about `error`; one that is not meant for clients is logged."""
    if isinstance(error, RequestFailed):
        return error
    logger.error("a request failed unexpectedly", exc_info=error)
    return internal()


def error_body(failure: RequestFailed) -> dict[str, Any]:
    """OpenAI's error object; `details` become further members of it."""
    return {
        "error": {
            **failure.details,
            "message": failure.message,
            "type": failure.kind,
            "param": failure.param,
            "code": failure.code,
        }
    }


def error_response(failure: RequestFailed) -> JSONResponse:
    """The response that says `failure`, with Retry-After where waiting can help."""
    headers = {}
    if failure.retry_after_s is not None:
        headers["Retry-After"] = str(failure.retry_after_s)
    return JSONResponse(error_body(failure), status_code=failure.status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Give every error that an endpoint or the routing of `app` raises the same shape."""

    async def on_failure(_: HTTPRequest, error: Exception) -> JSONResponse:
        return error_response(as_failure(error))

    async def on_http_exception(request: HTTPRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = error_response(_routing_failure(error.status_code))
        response.headers.update(error.headers or {})  # Allow, of a 405
        return response

    app.add_exception_handler(RequestFailed, on_failure)
    app.add_exception_handler(HTTPException, on_http_exception)


def _routing_failure(status: int) -> RequestFailed:
    match status:
        case 404:
            return invalid(
                "There is no such endpoint; /openapi.json lists them.",
                param=None,
                code="not_found",
                status=404,
            )
        case 405:
            return invalid(
                "The endpoint does not take this method; see the Allow header.",
                param=None,
                code="method_not_allowed",
                status=405,
            )
        case _:
            return invalid(
                "The request is not valid HTTP.", param=None, code="bad_request", status=status
            )
