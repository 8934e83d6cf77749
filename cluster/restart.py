"""When a worker that ended is started again: pure, `(state, event, now) → (state, action)`.

The first deaths in a row are answered at once, so that a killed worker is back soon; a worker that
keeps dying young is started ever more rarely.
"""

from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
from typing import NamedTuple


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Seconds, but for the count. Raises ValueError, which names the field."""

    quick_restarts: int = 3  # deaths in a row that are answered at once
    backoff_s: float = 1.0  # before the restart after those; doubles with each further death
    max_backoff_s: float = 30.0
    stable_s: float = 60.0  # a worker that lived so long has its earlier deaths forgotten

    def __post_init__(self) -> None:
        if self.quick_restarts < 0:
            raise ValueError(f"quick_restarts is {self.quick_restarts}; it must be 0 or more")
        if not 0 < self.backoff_s <= self.max_backoff_s:
            raise ValueError(
                f"backoff_s is {self.backoff_s}; it must be above 0 and at most max_backoff_s"
            )
        if self.stable_s <= 0:
            raise ValueError(f"stable_s is {self.stable_s}; it must be above 0")

    def delay_s(self, deaths: int) -> float:
        """Seconds to wait before the restart that follows the last of `deaths` in a row."""
        excess = deaths - self.quick_restarts
        if excess <= 0:
            return 0.0
        # Bounded exponent: 2.0**1024 would overflow, and the result is capped long before.
        return min(self.max_backoff_s, self.backoff_s * 2.0 ** min(excess - 1, 64))


class Phase(StrEnum):
    NEW = "new"
    RUNNING = "running"
    KILLING = "killing"  # it hung
    WAITING = "waiting"  # dead, until its backoff is over
    STOPPING = "stopping"
    ENDED = "ended"


class Event(Enum):
    BEGIN = auto()
    EXITED = auto()  # the process ended, or could not be started
    WAITED = auto()  # the time of a Wait is over
    HUNG = auto()  # the process runs, but does nothing
    STOP = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """Where one worker is in its life."""

    phase: Phase = Phase.NEW
    deaths: int = 0  # in a row, without a stable life between them
    started_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Launch:
    """Start the process; it EXITED, HUNG or STOP comes next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Do nothing for so long; WAITED, or STOP, comes next."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Terminate:
    """End the process; it EXITED comes next."""


@dataclass(frozen=True, slots=True)
class Kill:
    """End the process, which would not do it itself; it EXITED comes next."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing comes next."""


Action = Launch | Wait | Terminate | Kill | Finish


class Decision(NamedTuple):
    state: Supervision
    action: Action


def decide(policy: RestartPolicy, state: Supervision, event: Event, now: float) -> Decision:
    """The next state and the one thing to do. Raises ValueError for an event out of turn."""
    match state.phase, event:
        case (Phase.NEW, Event.BEGIN) | (Phase.WAITING, Event.WAITED):
            return Decision(replace(state, phase=Phase.RUNNING, started_at=now), Launch())
        case Phase.RUNNING | Phase.KILLING, Event.EXITED:
            lived_s = now - state.started_at
            deaths = 1 if lived_s >= policy.stable_s else state.deaths + 1
            waiting = replace(state, phase=Phase.WAITING, deaths=deaths)
            return Decision(waiting, Wait(delay_s=policy.delay_s(deaths)))
        case Phase.RUNNING, Event.HUNG:
            return Decision(replace(state, phase=Phase.KILLING), Kill())
        case Phase.RUNNING, Event.STOP:
            return Decision(replace(state, phase=Phase.STOPPING), Terminate())
        case (Phase.STOPPING, Event.EXITED) | (Phase.NEW | Phase.WAITING, Event.STOP):
            return Decision(replace(state, phase=Phase.ENDED), Finish())
    raise ValueError(f"a worker that is {state.phase} cannot take {event.name}")
