"""How long the model has been at what it does now, as far as its process was there to see it. Pure.

A thread that hangs cannot say so; the event loop beside it can.
"""

_MAX_GAP_S = 1.0  # between two looks of a process that is merely busy


class StepWatch:
    """Adds up the time between looks; of a longer gap most was a pause of the whole process."""

    def __init__(self) -> None:
        self._seconds: float | None = None  # None: nothing runs
        self._looked_at = 0.0

    def begin(self, now: float) -> None:
        """The model's thread has been given something to do."""
        self._seconds = 0.0
        self._looked_at = now

    def end(self) -> None:
        """It is done."""
        self._seconds = None

    def look(self, now: float) -> float:
        """Seconds for which it has been at work; 0 if it is not."""
        if self._seconds is None:
            return 0.0
        self._seconds += min(now - self._looked_at, _MAX_GAP_S)
        self._looked_at = now
        return self._seconds
