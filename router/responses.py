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
from pagewire.router.output import OutputText
from pagewire.router.settings import RouterSettings
from pagewire.router.shapes import ChoiceShape, ResponseShape, Usage
from pagewire.router.sse import EventWriter
from pagewire.router.time_ledger import TimeSplit


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A generation that has not been submitted yet, and how to write it."""

    generation: Generation
    shape: ResponseShape
    num_prompt_tokens: int
    wants_ledger: bool = False

    @property
    def time_split(self) -> TimeSplit | None:
        """Where the time of the finished generation went, if the client wants to know."""
        return self.generation.time_split if self.wants_ledger else None

    def usage(self) -> dict[str, Any]:
        """Tokens and time of the finished generation."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.generation.num_tokens,
            cached_tokens=self.generation.num_cached_tokens,
            time_split=self.time_split,
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
            body = await self._collect()
        except Exception as error:  # whatever went wrong, the client gets an error object
            return error_response(as_failure(error))
        split = self._answer.time_split
        return JSONResponse(body, headers={"Server-Timing": split.server_timing()} if split else {})

    async def _collect(self) -> dict[str, Any]:
        shape = self._answer.shape
        with self._answer.generation as generation:
            texts: list[list[str]] = [[] for _ in generation.outputs]
            async for piece in generation.pieces():
                texts[piece.choice].append(piece.text)
        choices = [
            shape.choice(index).whole("".join(text), output)
            for index, (text, output) in enumerate(zip(texts, generation.outputs, strict=True))
        ]
        return shape.whole(choices) | {"usage": self._answer.usage()}


class _StreamedChoice:
    """One choice as the items of a stream's events."""

    def __init__(self, shape: ChoiceShape, output: OutputText) -> None:
        self._shape = shape
        self._output = output
        self._opening = shape.opening()  # empty once it is out

    def text(self, text: str) -> list[dict[str, Any]]:
        """New text, behind what opens the choice; nothing if there is no news."""
        items, self._opening = self._opening, []
        logprobs = self._output.take_logprobs()
        return [*items, self._shape.text(text, logprobs)] if text or logprobs else items

    def ending(self) -> list[dict[str, Any]]:
        """The end of the choice, once it has come to it."""
        return [] if self._output.finish_reason is None else [self._shape.ending(self._output)]


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
        last: list[dict[str, Any]] = []
        # The keep-alive is the outer block: an end of the generation must not wait for a write.
        async with writer.keep_alive(self._settings.keep_alive_s):
            with self._answer.generation as generation:
                choices = [
                    _StreamedChoice(shape.choice(index), output)
                    for index, output in enumerate(generation.outputs)
                ]
                async for piece in generation.pieces():
                    items = choices[piece.choice].text(piece.text)
                    last = choices[piece.choice].ending()
                    if not generation.is_finished:
                        items = [*items, *last]
                    if items:
                        await writer.write(*map(self._event, items))
        closing = [*map(self._event, last)]
        if self._include_usage:
            closing.append(shape.chunk([]) | {"usage": self._answer.usage()})
        await writer.finish(*closing)

    def _event(self, item: dict[str, Any]) -> dict[str, Any]:
        chunk = self._answer.shape.chunk([item])
        return chunk | {"usage": None} if self._include_usage else chunk
