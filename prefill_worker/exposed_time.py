"""What a hand-off costs its client on the prefill worker: the time from the last chunk to the Seal.

Frames that leave while the prompt is still computed cost nothing, so the count begins at the end
of the last chunk. From there every moment belongs to one of three parts. Pure.
"""

from pagewire.worker.interval import Interval


class ExposedTime:
    """Divides the time since `begin`; seconds on the worker's clock.

    The parts sum to the time between `begin` and the last event, whatever happened before it.
    """

    def __init__(self) -> None:
        self.grant_wait_s = 0.0  # no frame was on its way: D had no room, or no slot
        self.gather_s = 0.0  # a frame's runs were found and their checksum made
        self.wire_s = 0.0  # the rest of the way of frames, those of others before them included
        self._divided_until: float | None = None  # None: the prompt is not computed

    def begin(self, now: float) -> None:
        """The last chunk is computed."""
        self._divided_until = now

    def waited(self, now: float) -> None:
        """Until now no frame was on its way."""
        self.grant_wait_s += self._spent(now)

    def sent(self, now: float, gathered: Interval | None) -> None:
        """Until now frames were on their way; the one that arrived was gathered in `gathered`."""
        since = self._divided_until
        spent = self._spent(now)
        gathering = gathered.seconds_within(since, now) if gathered and since is not None else 0.0
        self.gather_s += gathering
        self.wire_s += spent - gathering

    def _spent(self, now: float) -> float:
        """Seconds since the last event; none before `begin`."""
        if self._divided_until is None:
            return 0.0
        spent = now - self._divided_until
        self._divided_until = now
        return spent
