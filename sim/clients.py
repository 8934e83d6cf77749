"""What every client asked for and was told, checked against what it should have been told."""

from dataclasses import dataclass, field
from enum import Enum, auto

from pagewire.router.request import FinishReason, RequestFailed, TokenUpdate
from pagewire.sim.violation import require


class Outcome(Enum):
    DONE = auto()
    FAILED = auto()
    REFUSED = auto()
    CANCELLED = auto()
    ROUTER_LOST = auto()


@dataclass(slots=True, kw_only=True)
class ClientStream:
    """One request, seen from outside."""

    request_id: str
    router: str  # name of its process
    expected: list[int]
    finish_reason: FinishReason
    tokens: list[int] = field(default_factory=list)
    outcome: Outcome | None = None
    error: RequestFailed | None = None


class Clients:
    """Takes every event of every stream. Raises InvariantViolation at the first wrong one."""

    def __init__(self) -> None:
        self.streams: dict[str, ClientStream] = {}

    def open(self) -> list[ClientStream]:
        """Streams that have not ended."""
        return [stream for stream in self.streams.values() if stream.outcome is None]

    def with_outcome(self, *outcomes: Outcome) -> list[ClientStream]:
        """Streams that have ended in one of these ways."""
        return [stream for stream in self.streams.values() if stream.outcome in outcomes]

    def add(self, stream: ClientStream) -> None:
        self.streams[stream.request_id] = stream

    def on_update(self, request_id: str, update: TokenUpdate) -> None:
        stream = self.streams[request_id]
        require(stream.outcome is None, f"{request_id} got tokens after its end")
        require(
            update.position == len(stream.tokens),
            f"{request_id} got position {update.position} after {len(stream.tokens)} tokens",
        )
        stream.tokens += update.token_ids
        require(
            stream.tokens == stream.expected[: len(stream.tokens)],
            f"{request_id} got a wrong token among its first {len(stream.tokens)}",
        )
        if update.finish_reason is not None:
            self._on_finished(stream, update.finish_reason)

    def on_failed(self, request_id: str, error: RequestFailed) -> None:
        self._end(request_id, Outcome.FAILED, error)

    def on_refused(self, request_id: str, error: RequestFailed) -> None:
        self._end(request_id, Outcome.REFUSED, error)

    def on_cancelled(self, request_id: str) -> None:
        """The client hangs up, unless it has its answer."""
        if self.streams[request_id].outcome is None:
            self._end(request_id, Outcome.CANCELLED)

    def on_router_lost(self, router: str) -> None:
        """The connections of a router's clients break."""
        for stream in self.streams.values():
            if stream.router == router and stream.outcome is None:
                self._end(stream.request_id, Outcome.ROUTER_LOST)

    def _on_finished(self, stream: ClientStream, reason: FinishReason) -> None:
        require(
            (stream.tokens, reason) == (stream.expected, stream.finish_reason),
            f"{stream.request_id} ended with {reason} after {len(stream.tokens)} of "
            f"{len(stream.expected)} tokens",
        )
        self._end(stream.request_id, Outcome.DONE)

    def _end(self, request_id: str, outcome: Outcome, error: RequestFailed | None = None) -> None:
        stream = self.streams[request_id]
        require(stream.outcome is None, f"{request_id} ended twice")
        stream.outcome = outcome
        stream.error = error
