"""What every client asked for and was told, checked against what it should have been told."""

from dataclasses import dataclass, field
from enum import Enum, auto

from pagewire.router.request import FinishReason, RequestFailed, TokenUpdate
from pagewire.sim.violation import require

_ROUNDING_S = 1e-9  # of sums of times


class Outcome(Enum):
    DONE = auto()
    FAILED = auto()
    REFUSED = auto()
    CANCELLED = auto()
    ROUTER_LOST = auto()


@dataclass(slots=True, kw_only=True)
class ClientChoice:
    """One choice of a request, seen from outside."""

    expected: list[int]
    finish_reason: FinishReason
    tokens: list[int] = field(default_factory=list)
    has_ended: bool = False


@dataclass(slots=True, kw_only=True)
class ClientStream:
    """One request, seen from outside."""

    request_id: str
    router: str  # name of its process
    choices: list[ClientChoice]
    opened: float  # seconds of virtual time
    reported_s: float = 0.0  # parts of its time, of which it was told
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

    def on_update(self, request_id: str, update: TokenUpdate, now: float) -> None:
        stream = self.streams[request_id]
        stream.reported_s += sum(update.times.values())
        require(
            min(update.times.values(), default=0.0) >= 0
            and stream.reported_s <= now - stream.opened + _ROUNDING_S,
            f"{request_id} was told of {stream.reported_s} s within {now - stream.opened} s",
        )
        choice = stream.choices[update.choice]
        name = f"choice {update.choice} of {request_id}"
        require(stream.outcome is None and not choice.has_ended, f"{name} got tokens after its end")
        require(
            update.position == len(choice.tokens),
            f"{name} got position {update.position} after {len(choice.tokens)} tokens",
        )
        choice.tokens += update.token_ids
        require(
            choice.tokens == choice.expected[: len(choice.tokens)],
            f"{name} got a wrong token among its first {len(choice.tokens)}",
        )
        if update.finish_reason is not None:
            require(
                (choice.tokens, update.finish_reason) == (choice.expected, choice.finish_reason),
                f"{name} ended with {update.finish_reason} after {len(choice.tokens)} of "
                f"{len(choice.expected)} tokens",
            )
            self._end_choice(stream, choice)

    def on_stopped(self, request_id: str, index: int) -> bool:
        """The client has enough of one choice; whether that has begun and goes on."""
        stream = self.streams[request_id]
        choice = stream.choices[index]
        if stream.outcome is not None or choice.has_ended or not choice.tokens:
            return False
        self._end_choice(stream, choice)
        return True

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

    def _end_choice(self, stream: ClientStream, choice: ClientChoice) -> None:
        choice.has_ended = True
        if all(each.has_ended for each in stream.choices):
            self._end(stream.request_id, Outcome.DONE)

    def _end(self, request_id: str, outcome: Outcome, error: RequestFailed | None = None) -> None:
        stream = self.streams[request_id]
        require(stream.outcome is None, f"{request_id} ended twice")
        stream.outcome = outcome
        stream.error = error
