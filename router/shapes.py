"""The responses of the OpenAI API, whole and in chunks, for chat and for plain completions.

Everything that differs between the two endpoints after validation is here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pagewire.router.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    LogprobsFormat,
    Spell,
    TokenLogprob,
)
from pagewire.router.output import OutputText
from pagewire.router.time_ledger import TimeSplit


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request, and its time where that was asked for."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    time_split: TimeSplit | None = None

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a response."""
        ledger = {"ledger": self.time_split.as_dict()} if self.time_split else {}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **ledger,
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


class ChoiceShape(Protocol):
    """How one endpoint writes one choice: the items of `choices` in its responses."""

    def opening(self) -> list[dict[str, Any]]:
        """What is streamed in front of the first text."""

    def text(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Streamed text, with the logprobs of the tokens behind it where they were asked for."""

    def ending(self, output: OutputText) -> dict[str, Any]:
        """What is streamed last, with the finish_reason."""

    def whole(self, text: str, output: OutputText) -> dict[str, Any]:
        """The choice that is not streamed."""


class ResponseShape(Protocol):
    """How one endpoint writes its responses."""

    def choice(self, index: int) -> ChoiceShape:
        """One of the choices."""

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """An event of a stream."""

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The response that is not streamed, without its usage."""


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, envelope: Envelope, spell: Spell) -> None:
        self._envelope = envelope
        self._spell = spell

    def choice(self, index: int) -> ChoiceShape:
        return _ChatChoice(index, ChatLogprobs(self._spell))

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope.wrap("chat.completion.chunk", choices)

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope.wrap("chat.completion", choices)


class _ChatChoice:
    """Implements ChoiceShape."""

    def __init__(self, index: int, logprobs: LogprobsFormat) -> None:
        self._index = index
        self._logprobs = logprobs

    def opening(self) -> list[dict[str, Any]]:
        return [self._item({"role": "assistant", "content": ""}, _unfinished())]

    def text(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        end = _unfinished(self._logprobs(logprobs) if logprobs else None)
        return self._item({"content": text}, end)

    def ending(self, output: OutputText) -> dict[str, Any]:
        return self._item({}, _finished(output, self._logprobs))

    def whole(self, text: str, output: OutputText) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": self._index, "message": message, **_finished(output, self._logprobs)}

    def _item(self, delta: dict[str, str], end: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, **end}


class CompletionShape:
    """/v1/completions."""

    def __init__(self, envelope: Envelope, spell: Spell) -> None:
        self._envelope = envelope
        self._spell = spell

    def choice(self, index: int) -> ChoiceShape:
        return _CompletionChoice(index, CompletionLogprobs(self._spell))

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope.wrap("text_completion", choices)

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope.wrap("text_completion", choices)


class _CompletionChoice:
    """Implements ChoiceShape."""

    def __init__(self, index: int, logprobs: LogprobsFormat) -> None:
        self._index = index
        self._logprobs = logprobs

    def opening(self) -> list[dict[str, Any]]:
        return []

    def text(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._item(text, _unfinished(self._logprobs(logprobs) if logprobs else None))

    def ending(self, output: OutputText) -> dict[str, Any]:
        return self._item("", _finished(output, self._logprobs))

    def whole(self, text: str, output: OutputText) -> dict[str, Any]:
        return self._item(text, _finished(output, self._logprobs))

    def _item(self, text: str, end: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "text": text, **end}


def _unfinished(logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"logprobs": logprobs, "finish_reason": None}


def _finished(output: OutputText, logprobs_format: LogprobsFormat) -> dict[str, Any]:
    logprobs = output.take_logprobs()  # in a stream, those of the text were taken with it
    return {
        "logprobs": logprobs_format(logprobs) if logprobs else None,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
