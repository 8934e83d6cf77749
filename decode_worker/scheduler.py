"""Which sequences a decode step runs. Pure."""

from dataclasses import dataclass

from pagewire.decode_worker.sequence import DecodeSequence


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """A ready sequence, and since which step it has been running or waiting without a break."""

    sequence: DecodeSequence
    since: int
    is_running: bool = False


class DecodeScheduler:
    """Continuous batching: sequences join and leave the running batch at every step.

    While there are more than fit, lower priority numbers run first, and among equals those that
    run go on. Whoever has waited for `ageing_steps` gets a place, though: that of a sequence with
    the highest priority number or, among equals, of the one that has run the longest. So a
    straggler with a long output does not hold its place for ever; it pauses, ages and comes back.
    A sequence keeps its pages while it pauses.
    """

    def __init__(self, max_batch_size: int, *, ageing_steps: int = 64) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        self._max_batch_size = max_batch_size
        self._ageing_steps = ageing_steps
        self._num_steps = 0
        self._entries: dict[DecodeSequence, _Entry] = {}  # in order of becoming ready

    @property
    def num_running(self) -> int:
        return min(len(self._entries), self._max_batch_size)

    @property
    def num_waiting(self) -> int:
        return len(self._entries) - self.num_running

    def add(self, sequence: DecodeSequence) -> None:
        self._entries[sequence] = _Entry(sequence=sequence, since=self._num_steps)

    def remove(self, sequence: DecodeSequence) -> None:
        """Forget a sequence, whether it runs, waits or is unknown."""
        self._entries.pop(sequence, None)

    def schedule(self) -> list[DecodeSequence]:
        """The sequences of the next step, one token each, in order of becoming ready."""
        self._num_steps += 1
        entries = list(self._entries.values())
        places = set(range(len(entries)))
        if len(entries) > self._max_batch_size:
            ranked = sorted(places, key=lambda index: self._rank(entries[index]))
            places = set(ranked[: self._max_batch_size])
        for index, entry in enumerate(entries):
            if entry.is_running is not (index in places):
                entry.is_running = not entry.is_running
                entry.since = self._num_steps
        return [entry.sequence for entry in entries if entry.is_running]

    def _rank(self, entry: _Entry) -> tuple[int, ...]:
        """The smallest is the first to get a place; equals keep their order."""
        if entry.is_running:
            return (1, entry.sequence.priority, 0, -entry.since)
        if self._num_steps - entry.since > self._ageing_steps:
            return (0, entry.since)
        return (1, entry.sequence.priority, 1, entry.since)
