"""Runs one generation and answers with its text, whole or as server-sent events.

Both answers end the request when the client goes away, and neither lets a failure pass as an
answer: before the first byte it is an HTTP status, after it an error event.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pagewire.router.disconnect import DisconnectScope
from pagewire.router.errors import ClientGone, as_failure, error_body, error_response
from pagewire.router.generation import Generation
from pagewire.router.settings import RouterSettings
from pagewire.router.shapes import ResponseShape, Usage
from pagewire.router.sse import EventWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A generation that has not been submitted yet, and how to write it."""

    generation: Generation
    shape: ResponseShape
    num_prompt_tokens: int

    def usage(self) -> dict[str, Any]:
        """Tokens up to now."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.generation.output.num_tokens,
            cached_tokens=self.generation.output.num_cached_tokens,
        ).as_dict()


class WholeResponse(Response):
    """The answer in one JSON object."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submit, collect and send."""
        async with DisconnectScope(receive):
            response = await self._respond()
            await response(scope, receive, send)

    async def _respond(self) -> Response:
        try:
            return JSONResponse(await self._collect())
        except Exception as error:  # whatever went wrong, the client gets an error object
            return error_response(as_failure(error))

    async def _collect(self) -> dict[str, Any]:
        with self._answer.generation as generation:
            text = "".join([piece async for piece in generation.texts()])
        whole = self._answer.shape.whole(text, generation.output)
        return whole | {"usage": self._answer.usage()}


class EventStreamResponse(Response):
    """The answer as server-sent events."""

    def __init__(
        self,
        answer: Answer,
        *,
        include_usage: bool,
        settings: RouterSettings,
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self._answer = answer
        self._include_usage = include_usage
        self._settings = settings
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submit and send as the tokens come."""
        writer = EventWriter(send, clock=self._clock, send_timeout_s=self._settings.send_timeout_s)
        async with DisconnectScope(receive):
            try:
                await self._stream(writer)
            except ClientGone:
                return
            except Exception as error:  # whatever went wrong, the stream says so
                failure = as_failure(error)
                if writer.started:
                    await writer.finish(error_body(failure))
                else:
                    await error_response(failure)(scope, receive, send)

    async def _stream(self, writer: EventWriter) -> None:
        shape = self._answer.shape
        # The keep-alive is the outer block: an end of the generation must not wait for a write.
        async with writer.keep_alive(self._settings.keep_alive_s):
            with self._answer.generation as generation:
                opening = shape.opening()
                async for text in generation.texts():
                    logprobs = generation.output.take_logprobs()
                    has_news = bool(text or logprobs)
                    events = [*opening, shape.text(text, logprobs)] if has_news else opening
                    opening = []
                    if events:
                        await writer.write(*map(self._event, events))
        closing = [self._event(shape.ending(generation.output))]
        if self._include_usage:
            closing.append(shape.usage() | {"usage": self._answer.usage()})
        await writer.finish(*closing)

    def _event(self, chunk: dict[str, Any]) -> dict[str, Any]:
        return chunk | {"usage": None} if self._include_usage else chunk
