"""The parts of a stage: each is measured alone, so that one which fails costs itself only."""

import faulthandler
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from gpu_stages.journal import Began, Ended, LeftOut, Measured, Record, Skipped
from gpu_stages.measurement import Measurement

ITEM_LIMIT_S = 60.0  # of an item that hangs; some compile a dozen kernels


class InapplicableError(Exception):
    """What an item measures does not exist here. The text is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing that a stage measures, with memory that is taken and given back within."""

    name: str
    measure: Callable[[], Iterable[Measurement]]  # may raise InapplicableError
    limit_s: float = ITEM_LIMIT_S


def run_items(
    items: Iterable[Item],
    write: Callable[[Record], None],
    *,
    begun: frozenset[str],
    seconds: float,
    clock: Callable[[], float],
    free: Callable[[], None],
    log: TextIO,
    patience: float = 1.0,
) -> None:
    """Measure one item after another and write down what becomes of each.

    Those that have `begun` already are passed over, and none begins after so many seconds. `free`
    gives back memory behind each. An item that raises ends this, for what it did to a GPU may make
    all others fail: they are run by another process. One that takes longer than its limit ends the
    process, with its traceback in `log`; `patience` multiplies these limits.
    """
    end = clock() + seconds
    for item in items:
        if item.name in begun:
            continue
        if clock() >= end:
            write(LeftOut(item=item.name))
            continue
        write(Began(item=item.name))
        with _ended_after(patience * item.limit_s, log):
            _measure(item, write)
        write(Ended(item=item.name))
        free()


def _measure(item: Item, write: Callable[[Record], None]) -> None:
    try:
        for measurement in item.measure():
            write(Measured(measurement=measurement))
    except InapplicableError as reason:
        write(Skipped(item=item.name, reason=str(reason)))


@contextmanager
def _ended_after(seconds: float, log: TextIO) -> Iterator[None]:
    """The process ends when the block takes longer: a kernel that hangs hears no exception."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=log)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
