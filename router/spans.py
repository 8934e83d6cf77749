"""From the time split of a request to the spans of its trace. Pure: it knows no tracing library.

One span is the whole request, and its children are the parts of its time. Attributes have the names
of OpenTelemetry's semantic conventions for generative AI where there is one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pagewire.router.time_ledger import Part, TimeSplit

Attributes = Mapping[str, str | int | tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRequest:
    """What a trace says of a request. Nothing that a client wrote is among it."""

    request_id: str  # the router's, as in the id of the response
    outcome: str  # stop, length, abort (client gone) or error
    error_code: str | None  # as in the error object, when the outcome is error
    finish_reasons: tuple[str, ...]  # of the choices that came to their end
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt
    num_output_tokens: int  # of all choices
    split: TimeSplit


class RequestTrace(Protocol):
    """The trace that one request belongs to."""

    def finish(self, request: FinishedRequest) -> None:
        """The request has ended just now; called once."""


class Tracing(Protocol):
    """Where traces go."""

    def begin(self, operation: str, headers: Mapping[str, str]) -> RequestTrace:
        """A request has arrived. `operation` is chat or text_completion.

        Its trace goes on where `traceparent` (W3C Trace Context) among `headers` says.
        """


class Span(NamedTuple):
    """A stretch of a request, in nanoseconds of Unix time."""

    name: str
    start_ns: int
    end_ns: int


def request_span(split: TimeSplit, name: str, ended_ns: int) -> Span:
    """The whole request, which ended at `ended_ns`."""
    return Span(name, ended_ns - _nanoseconds(split.total_s), ended_ns)


def part_spans(split: TimeSplit, ended_ns: int) -> Iterator[Span]:
    """The parts that took any time, in order: none overlaps another or leaves the request.

    Only durations are known of what workers did. The parts before decode follow each other from the
    arrival; decode lasts until the end. Between them lies what is left over for the network: a gap,
    since nobody knows where on the way it was spent.
    """
    start_ns = ended_ns - _nanoseconds(split.total_s)
    elapsed_s = 0.0
    for part in (*_BEFORE_DECODE, Part.NETWORK, Part.DECODE):
        begun_ns = start_ns + _nanoseconds(elapsed_s)
        elapsed_s += split.parts[part]
        span = Span(part.value, begun_ns, min(ended_ns, start_ns + _nanoseconds(elapsed_s)))
        if part is not Part.NETWORK and span.end_ns > span.start_ns:
            yield span


def request_attributes(request: FinishedRequest, *, operation: str, model: str) -> Attributes:
    """The attributes of the span of the whole request."""
    attributes: dict[str, str | int | tuple[str, ...]] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "pagewire",
        "gen_ai.request.model": model,
        "gen_ai.response.finish_reasons": request.finish_reasons,
        "gen_ai.usage.input_tokens": request.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": request.num_cached_tokens,
        "gen_ai.usage.output_tokens": request.num_output_tokens,
        "pagewire.request_id": request.request_id,
        "pagewire.outcome": request.outcome,
    }
    if request.error_code is not None:
        attributes["error.type"] = request.error_code
    return attributes


_BEFORE_DECODE = tuple(part for part in Part if part not in (Part.NETWORK, Part.DECODE))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
