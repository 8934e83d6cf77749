"""When a worker whose process runs counts as hung: pure.

A process can live and yet do nothing: stopped, deadlocked, or stuck in a driver. What tells is that
no router hears of it; or, when only its model hangs, that one step goes on and on. Silence is
counted in looks, not in seconds, so a pause of this process, or of the whole machine, is not taken
for silence of the workers; how long a step runs, the worker counts in the same spirit.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HangPolicy:
    """Seconds. Raises ValueError, which names the field."""

    start_s: float = 300.0  # for a new process to be heard for the first time
    silence_s: float = 30.0  # of one that was heard
    step_s: float = 120.0  # of one step: at most max_batch_tokens of a prompt, or a token for each
    look_s: float = 1.0  # between two looks

    def __post_init__(self) -> None:
        for name in ("start_s", "silence_s", "step_s", "look_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


class HangWatch:
    """Looks at one process, from its start on."""

    def __init__(self, policy: HangPolicy) -> None:
        self._policy = policy
        self._was_heard = False
        self._num_silent = 0  # looks in a row

    def look(self, step_s: float | None) -> str | None:
        """Why the process counts as hung, as a clause; None: it does not.

        `step_s` is for how long it says that its step has run; None: no router hears of it.
        """
        is_heard = step_s is not None
        self._was_heard |= is_heard
        self._num_silent = 0 if is_heard else self._num_silent + 1
        limit = self._policy.silence_s if self._was_heard else self._policy.start_s
        if self._num_silent * self._policy.look_s >= limit:
            return "it did not answer"
        if step_s is not None and step_s >= self._policy.step_s:
            return f"it was at one step for {step_s:.0f} s (step_timeout_s)"
        return None
