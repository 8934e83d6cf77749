"""What every simulated process shares: time, chance, costs and faults."""

from collections import deque
from dataclasses import dataclass, field
from random import Random

from pagewire.sim.costs import Costs
from pagewire.sim.faults import NO_FAULTS, Faults
from pagewire.sim.timeline import Timeline

_TRACE_LENGTH = 40


@dataclass(slots=True, kw_only=True)
class Environment:
    """The one source of time and of random numbers in a run."""

    timeline: Timeline
    random: Random
    costs: Costs
    faults: Faults
    trace: deque[tuple[float, str, str]] = field(
        default_factory=lambda: deque(maxlen=_TRACE_LENGTH)
    )

    @property
    def now(self) -> float:
        return self.timeline.now

    def happens(self, probability: float) -> bool:
        """Throw a coin. Draws nothing when the outcome is certain to be no."""
        return probability > 0.0 and self.random.random() < probability

    def heal(self) -> None:
        """No fault from now on."""
        self.faults = NO_FAULTS

    def note(self, who: str, what: str) -> None:
        """Remember what happened last, for the report of a violation."""
        self.trace.append((self.now, who, what))
