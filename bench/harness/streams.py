"""One streamed answer as its client saw it, and the seam through which answers are asked for.

The load generator knows engines only as an `Endpoint`: a server over HTTP and an engine in a child
process look alike to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class StreamError(Exception):
    """A stream that was refused or broke off; the measurement that it belongs to is void."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTimes:
    """When a request was sent and when its output came. Seconds of `time.perf_counter`."""

    sent: float
    arrivals: tuple[float, ...]  # of each piece of output; a piece may hold several tokens
    num_tokens: int  # of output

    def __post_init__(self) -> None:
        if not self.arrivals:
            raise StreamError("a stream ended without any output")

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.sent

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for an output of one."""
        if self.num_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.num_tokens - 1)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """The time between each piece of output and the next (ITL)."""
        return tuple(
            later - earlier
            for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)
        )

    @property
    def end(self) -> float:
        return self.arrivals[-1]


class Endpoint(Protocol):
    """An engine that answers one prompt per call; calls may run at the same time."""

    async def stream(self, prompt: Sequence[int], max_tokens: int) -> StreamTimes:
        """Generate exactly `max_tokens` tokens greedily, end-of-sequence tokens ignored.

        Raises StreamError when the engine refuses, fails or stops early.
        """
