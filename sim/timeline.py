"""Virtual time: what happens next is the earliest entry of a heap, and it happens at once.

Two actions at the same instant run in the order in which they were planned, so a run depends on
nothing but its random seed.
"""

import heapq
from collections.abc import Callable
from itertools import count

Action = Callable[[], None]


class Timeline:
    """A clock that moves from action to action."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds
        self._order = count()
        self._planned: list[tuple[float, int, Action]] = []  # a heap

    def at(self, time: float, action: Action) -> None:
        """Plan `action` for `time`, or for now if that is past."""
        heapq.heappush(self._planned, (max(time, self.now), next(self._order), action))

    def after(self, delay: float, action: Action) -> None:
        """Plan `action` for `delay` seconds from now."""
        self.at(self.now + delay, action)

    def run_until(self, time: float) -> None:
        """Run everything that is planned up to `time`, then let the clock show it."""
        while self._planned and self._planned[0][0] <= time:
            self.now, _, action = heapq.heappop(self._planned)
            action()
        self.now = time
