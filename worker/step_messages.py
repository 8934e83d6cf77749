"""What rank 0 of a worker tells the other ranks: which pages to copy, and which steps to run.

Bounded msgpack behind its length, on a socket between a process and its child. The child says one
thing: that it has started.
"""

import socket
import struct
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields

import msgpack
import numpy as np

from pagewire.engine.batch import PageCopy
from pagewire.engine.step_memory import StepArrays, StepInputs, StepMemory, StepShape

STARTED = b"+"  # all that a child says

_LENGTH = struct.Struct("!I")
_MAX_BYTES = 64 << 20
_MAX_ITEMS = 1 << 16  # of one array
_COPIES, _STEP, _WARM_UP = 1, 2, 3


class StepMessageError(ValueError):
    """Bytes that are no message of rank 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Copy pages, one after another."""

    copies: tuple[PageCopy, ...]

    def encode(self) -> bytes:
        return _framed([_COPIES, *self.copies])


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUp:
    """Record decode steps of up to so many rows."""

    max_rows: int

    def encode(self) -> bytes:
        return _framed([_WARM_UP, self.max_rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Take part in a step."""

    num_threads: int  # compute threads of each rank
    by_layer: bool  # this and the next: see Followers
    is_fed: bool
    shape: StepShape
    arrays: tuple[bytes, ...]  # in the order of StepArrays.NAMES

    @classmethod
    def of(cls, arrays: StepArrays, *, num_threads: int, by_layer: bool, is_fed: bool) -> "Step":
        return cls(
            num_threads=num_threads,
            by_layer=by_layer,
            is_fed=is_fed,
            shape=arrays.shape,
            arrays=tuple(getattr(arrays, name).tobytes() for name in StepArrays.NAMES),
        )

    def encode(self) -> bytes:
        how = self.num_threads, self.by_layer, self.is_fed
        return _framed([_STEP, *how, *astuple(self.shape), *self.arrays])

    def inputs(self, memory: StepMemory) -> StepInputs:
        """The step's inputs; void once `memory` is used for the next one."""
        into = memory.arrays(self.shape)
        for name, data in zip(StepArrays.NAMES, self.arrays, strict=True):
            array = getattr(into, name)
            array.reshape(-1)[:] = np.frombuffer(data, array.dtype)
        return into.inputs()


Message = Copies | Step | WarmUp


def decode(body: bytes) -> Message:
    """The message in `body`, which is without its length. Raises StepMessageError."""
    try:
        code, *values = msgpack.unpackb(
            body, use_list=False, max_array_len=_MAX_ITEMS, max_map_len=0, max_ext_len=0
        )
        if code == _COPIES:
            return Copies(copies=tuple(PageCopy(*pair) for pair in values))
        if code == _STEP:
            num_threads, by_layer, is_fed, *shape = values[:8]
            names = (field.name for field in fields(StepShape))
            return Step(
                num_threads=num_threads,
                by_layer=by_layer,
                is_fed=is_fed,
                shape=StepShape(**dict(zip(names, shape, strict=True))),
                arrays=values[8:],
            )
        if code == _WARM_UP:
            [max_rows] = values
            return WarmUp(max_rows=max_rows)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise StepMessageError(f"no message of rank 0: {error}") from error
    raise StepMessageError(f"code {code!r} is unknown")


def receive(sock: socket.socket) -> bytes:
    """The body of the next message. Raises OSError, and StepMessageError when it is too long."""
    (length,) = _LENGTH.unpack(_receive_exactly(sock, _LENGTH.size))
    if length > _MAX_BYTES:
        raise StepMessageError(f"a message of {length} bytes; the limit is {_MAX_BYTES}")
    return _receive_exactly(sock, length)


def _receive_exactly(sock: socket.socket, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    rest = memoryview(data)
    while rest:
        count = sock.recv_into(rest)
        if count == 0:
            raise ConnectionResetError("rank 0 has ended")
        rest = rest[count:]
    return bytes(data)


def _framed(values: Iterable[object]) -> bytes:
    body: bytes = msgpack.packb(list(values))
    return _LENGTH.pack(len(body)) + body
