"""How long a process stood still: stopped, swapped out, or on a machine that slept. Pure."""

_MAX_GAP_S = 1.0  # between two ticks of a process that is merely busy


class Standstill:
    """Tells from the ticks of a process how much of the time it could not have noticed anything.

    Silence of others in that time says nothing about them: their answers may wait to be read.
    """

    def __init__(self) -> None:
        self._ticked_at: float | None = None

    def on_tick(self, now: float) -> float:
        """Seconds that have passed since the last tick beyond what a busy process takes."""
        gap = 0.0 if self._ticked_at is None else now - self._ticked_at
        self._ticked_at = now
        return max(0.0, gap - _MAX_GAP_S)
