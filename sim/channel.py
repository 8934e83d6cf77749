"""One direction of a connection: ordered and reliable, unless its faults say otherwise."""

from collections.abc import Callable

from pagewire.sim.environment import Environment
from pagewire.sim.faults import Faults, MessageFaults

_OVERTAKEN_S = 0.03  # how long a message that may be overtaken takes longer, at most


class Channel:
    """Says when messages arrive."""

    def __init__(self, environment: Environment, faults: Callable[[Faults], MessageFaults]) -> None:
        self._environment = environment
        self._select = faults
        self._clear_at = 0.0  # when the message sent last will have arrived

    @property
    def faults(self) -> MessageFaults:
        """What may happen to a message that is sent now."""
        return self._select(self._environment.faults)

    def arrivals(self, duration: float = 0.0) -> list[float]:
        """When the copies of a message begin to arrive, each for `duration` seconds."""
        copies = 2 if self._environment.happens(self.faults.repeat) else 1
        return [self._arrival(duration) for _ in range(copies)]

    def ordered_arrival(self, duration: float = 0.0) -> float:
        """When a message begins to arrive that no fault concerns."""
        environment = self._environment
        latency = environment.costs.latency.draw(environment.random)
        at = max(environment.now + latency, self._clear_at)
        self._clear_at = at + duration
        return at

    def _arrival(self, duration: float) -> float:
        environment = self._environment
        if not environment.happens(self.faults.reorder):
            return self.ordered_arrival(duration)
        latency = environment.costs.latency.draw(environment.random)
        return environment.now + latency + environment.random.uniform(0.0, _OVERTAKEN_S)
