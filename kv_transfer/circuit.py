"""A circuit breaker for one transport between two workers: a pure state machine.

    state      event                              → state
    CLOSED     lost, the limit is not reached       CLOSED     one loss more
    CLOSED     lost too often, refused, stalled     OPEN       a cool-down begins
    OPEN       tried                                HALF_OPEN
    HALF_OPEN  connected                            CLOSED
    HALF_OPEN  lost, refused, stalled               OPEN       a cool-down twice as long begins

Whatever does not fit the state is late news and changes nothing. After M. Nygard, Release It!
(2007), chapter "Circuit Breaker".
"""

from dataclasses import dataclass, replace
from enum import StrEnum


class CircuitState(StrEnum):
    CLOSED = "closed"  # in use, or free to be
    OPEN = "open"  # given up for a time
    HALF_OPEN = "half_open"  # being tried again


class CircuitEvent(StrEnum):
    TRIED = "tried"  # a connection is about to be made
    CONNECTED = "connected"
    REFUSED = "refused"  # no connection could be made
    LOST = "lost"  # a connection ended
    STALLED = "stalled"  # a hand-off over it made no progress


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitLimits:
    """When a transport is given up, and for how long."""

    max_losses: int = 3  # connections lost within window_s
    window_s: float = 60.0  # trips that follow each other within it count as one series
    cooldown_s: float = 10.0  # after the first trip of a series; doubles with each
    max_cooldown_s: float = 300.0
    backoff_s: float = 0.1  # the same, where there is no other transport
    max_backoff_s: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Circuit:
    """What is known of one transport of one pair. Times are seconds on the caller's clock."""

    state: CircuitState = CircuitState.CLOSED
    since: float = float("-inf")  # of the last change of state
    num_trips: int = 0  # in the series that is not over
    losses: tuple[float, ...] = ()  # when, within the window
    cause: CircuitEvent | None = None  # of the last trip

    def cooled_down_at(self, limits: CircuitLimits) -> float:
        """When the transport may be tried, though there is another."""
        return self._ready_at(limits.cooldown_s, limits.max_cooldown_s)

    def backed_off_at(self, limits: CircuitLimits) -> float:
        """When the transport may be tried, since there is no other."""
        return self._ready_at(limits.backoff_s, limits.max_backoff_s)

    def _ready_at(self, first_s: float, most_s: float) -> float:
        if self.state is CircuitState.CLOSED:
            return self.since
        doublings = min(self.num_trips - 1, 30)  # enough to reach any limit, and no overflow
        return self.since + min(first_s * 2.0**doublings, most_s)


def advance(circuit: Circuit, event: CircuitEvent, now: float, limits: CircuitLimits) -> Circuit:
    """The circuit after `event`."""
    match circuit.state, event:
        case CircuitState.CLOSED, CircuitEvent.LOST:
            return _count_loss(circuit, now, limits)
        case CircuitState.CLOSED, CircuitEvent.REFUSED | CircuitEvent.STALLED:
            return _trip(circuit, event, now, limits)
        case CircuitState.OPEN, CircuitEvent.TRIED:
            return replace(circuit, state=CircuitState.HALF_OPEN, since=now)
        case CircuitState.HALF_OPEN, CircuitEvent.CONNECTED:
            return replace(circuit, state=CircuitState.CLOSED, since=now, losses=())
        case (
            CircuitState.HALF_OPEN,
            CircuitEvent.LOST | CircuitEvent.REFUSED | CircuitEvent.STALLED,
        ):
            return _trip(circuit, event, now, limits)
    return circuit


def _count_loss(circuit: Circuit, now: float, limits: CircuitLimits) -> Circuit:
    recent = (*(at for at in circuit.losses if now - at < limits.window_s), now)
    if len(recent) < limits.max_losses:
        return replace(circuit, losses=recent)
    return _trip(circuit, CircuitEvent.LOST, now, limits)


def _trip(circuit: Circuit, cause: CircuitEvent, now: float, limits: CircuitLimits) -> Circuit:
    goes_on = circuit.state is CircuitState.HALF_OPEN or now - circuit.since < limits.window_s
    return Circuit(
        state=CircuitState.OPEN,
        since=now,
        num_trips=circuit.num_trips + 1 if goes_on else 1,
        cause=cause,
    )
