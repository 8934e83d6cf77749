"""A stretch of time on the clock of one process. Clocks of different processes do not compare."""

from typing import NamedTuple


class Interval(NamedTuple):
    """From `start` to `end`, in seconds on the clock of the process that measured it."""

    start: float
    end: float

    def seconds_within(self, start: float, end: float) -> float:
        """Seconds of it that lie between `start` and `end`; never negative."""
        return max(0.0, min(self.end, end) - max(self.start, start))
