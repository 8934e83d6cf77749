"""The responses of the OpenAI API, whole and in chunks, for chat and for plain completions.

Everything that differs between the two endpoints after validation is here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pagewire.router.logprobs import LogprobsFormat, TokenLogprob
from pagewire.router.output import OutputText


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, found in the prefix cache

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a response."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What all chunks of one response have in common."""

    response_id: str
    created: int  # seconds of Unix time
    model: str

    def wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A response object with `choices`."""
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


class ResponseShape(Protocol):
    """How one endpoint writes its responses."""

    def opening(self) -> list[dict[str, Any]]:
        """Chunks in front of the first text."""

    def text(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """A chunk of text, with the logprobs of the tokens behind it where they were asked for."""

    def ending(self, output: OutputText) -> dict[str, Any]:
        """The chunk with the finish_reason."""

    def usage(self) -> dict[str, Any]:
        """The chunk without choices to which the usage is added."""

    def whole(self, text: str, output: OutputText) -> dict[str, Any]:
        """The response that is not streamed, without its usage."""


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, envelope: Envelope, logprobs: LogprobsFormat) -> None:
        self._envelope = envelope
        self._logprobs = logprobs

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""}, _unfinished())]

    def text(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        end = _unfinished(self._logprobs(logprobs) if logprobs else None)
        return self._chunk({"content": text}, end)

    def ending(self, output: OutputText) -> dict[str, Any]:
        return self._chunk({}, _finished(output, self._logprobs))

    def usage(self) -> dict[str, Any]:
        return self._envelope.wrap("chat.completion.chunk", [])

    def whole(self, text: str, output: OutputText) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, **_finished(output, self._logprobs)}
        return self._envelope.wrap("chat.completion", [choice])

    def _chunk(self, delta: dict[str, str], end: dict[str, Any]) -> dict[str, Any]:
        return self._envelope.wrap("chat.completion.chunk", [{"index": 0, "delta": delta, **end}])


class CompletionShape:
    """/v1/completions."""

    def __init__(self, envelope: Envelope, logprobs: LogprobsFormat) -> None:
        self._envelope = envelope
        self._logprobs = logprobs

    def opening(self) -> list[dict[str, Any]]:
        return []

    def text(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._choice(text, _unfinished(self._logprobs(logprobs) if logprobs else None))

    def ending(self, output: OutputText) -> dict[str, Any]:
        return self._choice("", _finished(output, self._logprobs))

    def usage(self) -> dict[str, Any]:
        return self._envelope.wrap("text_completion", [])

    def whole(self, text: str, output: OutputText) -> dict[str, Any]:
        return self._choice(text, _finished(output, self._logprobs))

    def _choice(self, text: str, end: dict[str, Any]) -> dict[str, Any]:
        return self._envelope.wrap("text_completion", [{"index": 0, "text": text, **end}])


def _unfinished(logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"logprobs": logprobs, "finish_reason": None}


def _finished(output: OutputText, logprobs_format: LogprobsFormat) -> dict[str, Any]:
    logprobs = output.take_logprobs()  # in a stream, those of the text were taken with it
    return {
        "logprobs": logprobs_format(logprobs) if logprobs else None,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
