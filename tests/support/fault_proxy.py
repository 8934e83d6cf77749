"""A TCP proxy that does one thing wrong per connection, as a seed decides.

What it does to the bytes is pure (`Mangler`); the proxy around it only moves them.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum

_READ_BYTES = 64 * 1024
_DELAY_TURNS = 200  # of the event loop: enough for everything else to go on


class Fault(StrEnum):
    NONE = "none"
    DELAY = "delay"  # what follows comes late
    CUT = "cut"  # the connection ends, for both
    TRUNCATE = "truncate"  # bytes are missing, and so is all that follows: the connection ends
    LOSE = "lose"  # bytes are missing
    REORDER = "reorder"  # two halves of some bytes change places
    DUPLICATE = "duplicate"  # some bytes come twice
    FLIP = "flip"  # one bit is another
    HALF_OPEN = "half_open"  # nothing comes any more, and nobody is told


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """What goes wrong, and where."""

    fault: Fault
    upstream: bool  # from the end that connected to the one that listens; else the other way
    offset: int  # of the first byte concerned, in that direction
    length: int  # bytes concerned, at most
    bit: int = 0  # of the first of them

    @classmethod
    def draw(cls, source: random.Random, num_bytes: int, faults: Iterable[Fault]) -> "FaultPlan":
        """Any of `faults`, somewhere in `num_bytes` of upstream or in a tenth of that back."""
        upstream = source.random() < 0.7
        return cls(
            fault=source.choice(list(faults)),
            upstream=upstream,
            offset=source.randrange(num_bytes if upstream else num_bytes // 10),
            length=source.choice([1, 2, 7, 28, 200, 5000]),
            bit=source.randrange(8),
        )


class Mangler:
    """Carries out a plan on one direction of a connection."""

    def __init__(self, plan: FaultPlan) -> None:
        self._plan = plan
        self._num_seen = 0
        self.has_happened = False
        self.is_silent = False  # nothing comes out any more
        self.ends = False  # the connection shall end after what came out last

    def feed(self, data: bytes) -> list[bytes]:
        """What comes out where `data` goes in; where there is more than one piece, with a delay."""
        if self.is_silent:
            return []
        start = self._plan.offset - self._num_seen
        self._num_seen += len(data)
        if self.has_happened or not 0 <= start < len(data) or self._plan.fault is Fault.NONE:
            return [data]
        self.has_happened = True
        end = start + self._plan.length
        return self._mangle(data[:start], data[start:end], data[end:])

    def _mangle(self, before: bytes, concerned: bytes, after: bytes) -> list[bytes]:
        match self._plan.fault:
            case Fault.DELAY:
                return [before, concerned + after]
            case Fault.LOSE:
                return [before + after]
            case Fault.REORDER:
                half = len(concerned) // 2
                return [before + concerned[half:] + concerned[:half] + after]
            case Fault.DUPLICATE:
                return [before + concerned + concerned + after]
            case Fault.FLIP:
                flipped = bytes([concerned[0] ^ 1 << self._plan.bit])
                return [before + flipped + concerned[1:] + after]
            case Fault.HALF_OPEN:
                self.is_silent = True
                return [before]
            case Fault.CUT:
                self.ends = self.is_silent = True
                return [before]
            case _:
                self.ends = self.is_silent = True
                return [before + after[:1]]


class FaultProxy:
    """Forwards connections to `target` (host:port), with the next plan for each of them."""

    def __init__(self, target: str, plan: FaultPlan) -> None:
        self._host, _, port = target.partition(":")
        self._port = int(port)
        self._plan = plan
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._silenced: list[asyncio.StreamWriter] = []
        self.address = ""
        self.has_happened = False
        self._refuses = False

    @asynccontextmanager
    async def run(self) -> AsyncIterator["FaultProxy"]:
        """Listen on a free port until the block ends."""
        server = await asyncio.start_server(self._on_connection, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            _abort(self._writers)

    def heal(self) -> None:
        """From the next connection on, nothing goes wrong any more."""
        self._plan = replace(self._plan, fault=Fault.NONE)
        self._refuses = False

    def refuse(self) -> None:
        """From the next connection on, none gets any further."""
        self._refuses = True

    def silence(self) -> None:
        """Nothing comes out of the connections that there are, not even their end."""
        for task in self._tasks:
            task.cancel()
        self._silenced += self._writers

    def cut_silenced(self) -> None:
        """Now both ends of these connections learn that they have ended."""
        _abort(self._silenced)

    async def _on_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self._refuses:
            writer.transport.abort()
            return
        there = await asyncio.open_connection(self._host, self._port)
        writers = [writer, there[1]]
        self._writers += writers
        for source, sink, upstream in ((reader, there[1], True), (there[0], writer, False)):
            concerned = self._plan.upstream is upstream
            mangler = Mangler(self._plan) if concerned else None
            task = asyncio.create_task(self._pump(source, sink, mangler, writers))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        mangler: Mangler | None,
        writers: list[asyncio.StreamWriter],  # of both ends
    ) -> None:
        with suppress(OSError):  # one end has closed
            while data := await source.read(_READ_BYTES):
                pieces = [data] if mangler is None else mangler.feed(data)
                await _write(sink, pieces)
                if mangler is None:
                    continue
                self.has_happened |= mangler.has_happened
                if mangler.ends:
                    break
        if mangler is None or mangler.ends or not mangler.is_silent:
            _abort(writers)


def _abort(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.transport.abort()


async def _write(sink: asyncio.StreamWriter, pieces: list[bytes]) -> None:
    for number, piece in enumerate(pieces):
        for _ in range(_DELAY_TURNS if number else 0):
            await asyncio.sleep(0)
        sink.write(piece)
        await sink.drain()
