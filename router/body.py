"""Reads the JSON body of a request within limits of size and time.

Numbers outside JSON (NaN, Infinity) and integers too long to convert come out as non-finite
floats, so that the validation of the field that holds one can name it.
"""

import asyncio
import json
import math
from typing import Any

from fastapi import Request as HTTPRequest
from starlette.requests import ClientDisconnect

from pagewire.router.errors import ClientGone, invalid
from pagewire.router.request import RequestFailed
from pagewire.router.settings import RouterSettings

_MAX_DIGITS = 400  # no finite number of any field needs more


async def read_body(request: HTTPRequest, settings: RouterSettings) -> bytes:
    """The body of `request`.

    Raises:
        RequestFailed: 408, 413 or 415.
        ClientGone: the connection ended before the body did.
    """
    _check_headers(request, settings)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > settings.max_body_bytes:
                    raise _too_large(settings)
    except TimeoutError:
        raise invalid(
            f"The request body did not arrive within {settings.body_timeout_s:g} s.",
            param=None,
            code="body_timeout",
            status=408,
        ) from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises RequestFailed."""
    try:
        value = _parse(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise _not_json("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise _not_json(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise _not_json("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise _not_json("it is not an object")
    return value


def _check_headers(request: HTTPRequest, settings: RouterSettings) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise _unsupported_media("Compressed request bodies are refused; send it uncompressed.")
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise _unsupported_media("The body must be JSON; send Content-Type: application/json.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > settings.max_body_bytes:
        raise _too_large(settings)


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer longer than Python converts
        return json.loads(text, parse_int=_bounded_int)


def _bounded_int(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else math.inf


def _not_json(why: str) -> RequestFailed:
    return invalid(f"The body is not a JSON object: {why}.", param=None, code="invalid_json")


def _too_large(settings: RouterSettings) -> RequestFailed:
    return invalid(
        f"The request body is larger than {settings.max_body_bytes} bytes.",
        param=None,
        code="body_too_large",
        status=413,
    )


def _unsupported_media(message: str) -> RequestFailed:
    return invalid(message, param=None, code="unsupported_media_type", status=415)
