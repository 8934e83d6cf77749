"""Where the time of one request went, from its arrival to the end of its answer. Pure.

Clocks of different processes do not compare, so nobody knows when at a worker something happened:
every part is a duration by the clock of one process. The parts follow each other, each begins after
the message that ended the one before, so what they leave of the whole is the time between them.
docs/PROTOCOL.md defines each part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pagewire.proto import worker_pb2 as pb


class Part(StrEnum):
    """The parts, in the order in which they follow each other; the last lies between them."""

    PREPROCESS = "preprocess"
    QUEUE = "queue"
    PREFILL = "prefill"
    GRANT_WAIT = "grant_wait"
    GATHER = "gather"
    WIRE = "wire"
    SCATTER = "scatter"
    DECODE_QUEUE = "decode_queue"
    DECODE = "decode"
    NETWORK = "network"


PartTimes = Mapping[Part, float]  # seconds


def worker_times(message: pb.TimeParts) -> PartTimes:
    """What a worker has reported; parts that took no time are left out."""
    return {Part(field.name.removesuffix("_s")): seconds for field, seconds in message.ListFields()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplit:
    """The whole time of a request and its parts: all of them, never negative, summing to it."""

    total_s: float
    parts: PartTimes

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a response: milliseconds, exact to a nanosecond."""
        return {
            "total_ms": _milliseconds(self.total_s),
            "parts_ms": {part.value: _milliseconds(self.parts[part]) for part in Part},
        }

    def server_timing(self) -> str:
        """As the value of a Server-Timing header (W3C), which browsers show: milliseconds."""
        times = [("total", self.total_s), *self.parts.items()]
        return ", ".join(f"{name};dur={_milliseconds(seconds)}" for name, seconds in times)


class TimeLedger:
    """Collects the parts of one request. `now` is seconds on the clock that `arrived` is on."""

    def __init__(self, *, arrived: float) -> None:
        self._arrived = arrived
        self._parts: dict[Part, float] = {}
        self._decoding_since: float | None = None  # None: no step of the decode worker yet

    def submit(self, now: float) -> None:
        """The request is valid and its prompt tokenized."""
        self._add(Part.PREPROCESS, now - self._arrived)

    def record(self, times: PartTimes, now: float) -> None:
        """Parts that have become known.

        Once the first step of the decode worker is among them, all time that follows is decode.
        """
        for part, seconds in times.items():
            self._add(part, seconds)
        if Part.DECODE in times and self._decoding_since is None:
            self._decoding_since = now

    def close(self, now: float) -> TimeSplit:
        """The answer is complete.

        Whatever was reported, the parts sum to the whole: clocks of two machines may run at rates
        that differ by some parts in a million, so a part is cut where it exceeds what is left.
        """
        parts = dict(self._parts)
        if self._decoding_since is not None:
            parts[Part.DECODE] += max(0.0, now - self._decoding_since)
        total_s = left = max(0.0, now - self._arrived)
        split: dict[Part, float] = {}
        for part in Part:
            split[part] = left if part is Part.NETWORK else min(parts.get(part, 0.0), left)
            left -= split[part]
        return TimeSplit(total_s=total_s, parts=split)

    def _add(self, part: Part, seconds: float) -> None:
        self._parts[part] = self._parts.get(part, 0.0) + max(0.0, seconds)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 6)
