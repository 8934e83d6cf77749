"""When a worker whose process runs counts as hung: pure.

A process can live and yet do nothing: stopped, deadlocked, or stuck in a driver. What tells is that
no router hears of it. Looks are counted, not seconds, so a pause of this process, or of the whole
machine, is not taken for silence of the workers.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HangPolicy:
    """Seconds. Raises ValueError, which names the field."""

    start_s: float = 300.0  # for a new process to be heard for the first time
    silence_s: float = 30.0  # of one that was heard
    look_s: float = 1.0  # between two looks

    def __post_init__(self) -> None:
        for name in ("start_s", "silence_s", "look_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


class HangWatch:
    """Looks at one process, from its start on."""

    def __init__(self, policy: HangPolicy) -> None:
        self._policy = policy
        self._was_heard = False
        self._num_silent = 0  # looks in a row

    def look(self, is_heard: bool) -> bool:
        """Whether the process has hung; `is_heard`: a router has a connection to it."""
        self._was_heard |= is_heard
        self._num_silent = 0 if is_heard else self._num_silent + 1
        limit = self._policy.silence_s if self._was_heard else self._policy.start_s
        return self._num_silent * self._policy.look_s >= limit
