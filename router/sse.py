"""Writes server-sent events to a client.

The response starts with the first event, so that a failure before it can still be an HTTP
status. While there is nothing to say, comments keep the connection open.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Message, Send

from pagewire.router.errors import ClientGone

_KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]


class EventWriter:
    """One event stream. Its writes raise ClientGone when nobody reads."""

    def __init__(self, send: Send, *, clock: Callable[[], float], send_timeout_s: float) -> None:
        self._send = send
        self._clock = clock
        self._send_timeout_s = send_timeout_s
        self._last_write = clock()
        self._lock = asyncio.Lock()  # events and keep-alive comments come from two tasks
        self.started = False  # whether the HTTP status is out

    async def write(self, *events: Mapping[str, Any]) -> None:
        """Send events, in one piece."""
        await self._write(b"".join(_encode(each) for each in events))

    async def finish(self, *events: Mapping[str, Any]) -> None:
        """Send the last events and the end of the stream."""
        await self._write(b"".join(_encode(each) for each in events) + _DONE, more=False)

    @asynccontextmanager
    async def keep_alive(self, interval_s: float) -> AsyncIterator[None]:
        """Send a comment whenever the stream was silent for `interval_s` inside the block."""
        task = asyncio.create_task(self._send_comments(interval_s))
        try:
            yield
        finally:
            async with self._lock:  # not in the middle of a write
                task.cancel()

    async def _send_comments(self, interval_s: float) -> None:
        try:
            while True:
                idle_s = self._clock() - self._last_write
                if idle_s >= interval_s:
                    await self._write(_KEEP_ALIVE)
                    idle_s = 0.0
                await asyncio.sleep(interval_s - idle_s)
        except ClientGone:
            return  # whoever writes events finds out as well

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        async with self._lock:
            if not self.started:
                self.started = True
                await self._deliver(
                    {"type": "http.response.start", "status": 200, "headers": list(_HEADERS)}
                )
            await self._deliver({"type": "http.response.body", "body": data, "more_body": more})
            self._last_write = self._clock()

    async def _deliver(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await self._send(message)
        except OSError:  # the time-out is one too
            raise ClientGone from None


def _encode(event: Mapping[str, Any]) -> bytes:
    return f"data: {_JSON.encode(event)}\n\n".encode()
