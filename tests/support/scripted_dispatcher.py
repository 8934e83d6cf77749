"""A dispatcher whose streams follow a script, and an ASGI client that can leave at any moment."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from pagewire.router.request import (
    FinishReason,
    Request,
    RequestFailed,
    TokenUpdate,
    WorkerView,
)

Step = TokenUpdate | Exception | Callable[[], Awaitable[object]]


class ScriptedStream:
    """Yields, raises or waits, step by step."""

    def __init__(self, script: Sequence[Step]) -> None:
        self._script = script
        self.cancelled: list[str] = []
        self.stopped: list[int] = []  # choices

    async def __aiter__(self) -> AsyncIterator[TokenUpdate]:
        for step in self._script:
            match step:
                case TokenUpdate():
                    yield step
                case Exception():
                    raise step
                case _:
                    await step()

    def stop_choice(self, choice: int) -> None:
        self.stopped.append(choice)

    def cancel(self, reason: str) -> None:
        self.cancelled.append(reason)


class ScriptedDispatcher:
    """Takes every request and follows `script` for each."""

    def __init__(self) -> None:
        self.script: Sequence[Step] = ()
        self.requests: list[Request] = []
        self.streams: list[ScriptedStream] = []
        self.refusal: RequestFailed | None = None
        self.unready: RequestFailed | None = None
        self.workers: list[WorkerView] = []
        self.states: dict[str, int] = {}
        self.num_retries: dict[str, int] = {}
        self.capacity = 0

    def submit(self, request: Request) -> ScriptedStream:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        self.streams.append(ScriptedStream(self.script))
        return self.streams[-1]

    def check_ready(self) -> None:
        if self.unready is not None:
            raise self.unready

    async def inspect(self) -> list[WorkerView]:
        return self.workers

    def retries(self) -> Mapping[str, int]:
        return self.num_retries

    def counts(self) -> Mapping[str, int]:
        return self.states

    def max_kv_tokens(self, *, num_prompt_tokens: int = 0, n: int = 1) -> int:
        """As with pages of one token."""
        return num_prompt_tokens + (self.capacity - num_prompt_tokens) // n if self.capacity else 0


def updates(
    token_ids: Sequence[int],
    finish: FinishReason | None = FinishReason.LENGTH,
    choice: int = 0,
) -> list[TokenUpdate]:
    """One update for each token, the last with `finish`."""
    last = len(token_ids) - 1
    return [
        TokenUpdate(
            choice=choice,
            position=position,
            token_ids=(token_id,),
            finish_reason=finish if position == last else None,
        )
        for position, token_id in enumerate(token_ids)
    ]


class AsgiCall:
    """One POST, driven by hand: see each message as it is sent, and leave when you like."""

    def __init__(self, app: FastAPI, path: str, body: Mapping[str, Any]) -> None:
        self._received: asyncio.Queue[Message] = asyncio.Queue()
        self._received.put_nowait(
            {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        )
        self.sent: list[Message] = []
        self._sent: asyncio.Queue[Message] = asyncio.Queue()
        self.hold_sends: asyncio.Event | None = None  # a reader that stops reading
        self._app = app
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
            "client": ("client", 1),
            "server": ("server", 80),
        }
        self.done = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self._app(self._scope, self._received.get, self._send)

    async def _send(self, message: Message) -> None:
        if self.hold_sends is not None:
            await self.hold_sends.wait()
        self.sent.append(message)
        self._sent.put_nowait(message)

    async def next_message(self) -> Message:
        """The next message that the app sends."""
        return await asyncio.wait_for(self._sent.get(), timeout=20)

    async def finished(self) -> None:
        """Wait for the app to return."""
        await asyncio.wait_for(self.done, timeout=20)

    def disconnect(self) -> None:
        """Close the connection from the side of the client."""
        self._received.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        """All of the body up to now."""
        return b"".join(each.get("body", b"") for each in self.sent)


def events(body: str) -> list[Any]:
    """The payloads of an event stream, comments left out; [DONE] stays a string."""
    payloads = [
        line.removeprefix("data: ") for line in body.split("\n") if line.startswith("data: ")
    ]
    return [each if each == "[DONE]" else json.loads(each) for each in payloads]
