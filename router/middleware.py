"""What every HTTP response gets: an X-Request-Id, a count, and an error body if all else failed.

Plain ASGI: the usual base class for middleware would hide a client's disconnect.
"""

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagewire.router.errors import ClientGone, as_failure, error_response
from pagewire.router.metrics import RouterMetrics

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class ResponseMiddleware:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, metrics: RouterMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
                self._metrics.count_response(_endpoint(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except ClientGone:
            return
        except Exception as error:  # the last chance to answer in our shape
            if started:
                raise
            await error_response(as_failure(error))(scope, receive, send_marked)


def _request_id(headers: Headers) -> str:
    """The client's own label if it is harmless, else a new one."""
    label = headers.get("x-request-id", "")
    return label if _SAFE_ID.fullmatch(label) else secrets.token_hex(16)


def _endpoint(scope: Scope) -> str:
    """The route, as declared: paths that clients make up must not become labels."""
    return getattr(scope.get("route"), "path", "unknown")
