"""Kills a worker at a named step of a hand-off, to test what happens then.

PAGEWIRE_FAILPOINT=decode-0:Frame:2 ends decode-0 as SIGKILL does when its second Frame is here.
"""

import os
import signal
from collections.abc import Callable, Mapping
from typing import get_args

from pagewire.kv_transfer.messages import Message

VARIABLE = "PAGEWIRE_FAILPOINT"
_STEPS = frozenset(kind.__name__ for kind in get_args(Message))


def kill_this_process() -> None:
    """Nothing of it is cleaned up, and nobody is told."""
    os.kill(os.getpid(), signal.SIGKILL)


class Failpoint:
    """Counts the messages of one kind that arrive, and strikes at one of them."""

    def __init__(self, step: str, count: int, strike: Callable[[], None]) -> None:
        """`step` is the name of a message, `count` which of them it is, from 1."""
        self._step = step
        self._left = count
        self._strike = strike

    @classmethod
    def of_worker(
        cls,
        name: str,
        environment: Mapping[str, str],
        strike: Callable[[], None] = kill_this_process,
    ) -> "Failpoint | None":
        """That of the worker `name`, if it has one. Raises ValueError when it is malformed."""
        value = environment.get(VARIABLE)
        if value is None:
            return None
        worker, _, rest = value.partition(":")
        step, _, count = rest.partition(":")
        if step not in _STEPS or not count.isdecimal() or int(count) < 1:
            raise ValueError(
                f"{VARIABLE} is {value}; it must be worker:message:number, as decode-0:Frame:1"
            )
        return cls(step, int(count), strike) if worker == name else None

    def reach(self, message: Message) -> None:
        """`message` has arrived and is about to be acted upon."""
        if type(message).__name__ == self._step:
            self._left -= 1
            if not self._left:
                self._strike()
