"""What a stage writes down while it runs, a line at a time: however it ends, nothing is lost. Pure.

The process of a stage writes what it does; what it did not live to write is added by the one that
started it.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from gpu_stages.measurement import Measurement

DETAILS_CHARACTERS = 4000  # of a traceback, from its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Began:
    """An item begins."""

    item: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A figure of the item that began last."""

    measurement: Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """The item is not for this device."""

    item: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The item did not come to its end."""

    item: str
    reason: str
    details: str = ""  # its traceback


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """No time was left for the item."""

    item: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The item is done."""

    item: str


Record = Began | Measured | Skipped | Failed | LeftOut | Ended


def encode(record: Record) -> str:
    """As a line without its end."""
    return json.dumps({"record": type(record).__name__, **asdict(record)})


def decode(line: str) -> Record:
    """Raises ValueError for what `encode` did not write."""
    fields = json.loads(line)
    match fields.pop("record"):
        case "Began":
            return Began(**fields)
        case "Measured":
            return Measured(measurement=Measurement(**fields["measurement"]))
        case "Skipped":
            return Skipped(**fields)
        case "Failed":
            return Failed(**fields)
        case "LeftOut":
            return LeftOut(**fields)
        case "Ended":
            return Ended(**fields)
    raise ValueError(f"no journal has such a line: {line}")


def begun(records: Iterable[Record]) -> frozenset[str]:
    """Items that need not be begun again."""
    return frozenset(record.item for record in records if isinstance(record, Began))


def unfinished(records: Iterable[Record]) -> str | None:
    """The item in which the process ended; None: it ended between two."""
    current = None
    for record in records:
        match record:
            case Began(item=item):
                current = item
            case Ended() | Failed():
                current = None
    return current


def failed(item: str, reason: str, log: str) -> Failed:
    """`log`: what the process wrote, which ends with the traceback."""
    return Failed(item=item, reason=reason, details=log.strip()[-DETAILS_CHARACTERS:])
