"""The two ranks of one pair over gloo.

gloo wakes up whoever waits for an operation that its connection has not begun, but not who waits
for one that the end of the connection cuts in two. So nobody waits for a payload: behind it goes a
mark of one byte, and another comes back. Their receives are only begun once the payload is through.
"""

import contextlib
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pagewire.kv_transfer.group_link import PAYLOAD_TIMEOUT, as_tensor

_AT_ONCE = timedelta(milliseconds=1)
# Tags of the operations; gloo keeps the order of those with the same.
_PAYLOAD, _MARK, _ANSWER, _NOTHING = range(4)


class GlooGroup:
    """A PairGroup between host memories."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._answer: Any = None  # the last that was sent
        self._peer = 1 - group.rank()

    def send(self, payload: memoryview) -> None:
        sent = self._group.send([as_tensor(payload)], self._peer, _PAYLOAD)
        marked = self._group.send([_byte()], self._peer, _MARK)
        self._group.recv([_byte()], self._peer, _ANSWER).wait(PAYLOAD_TIMEOUT)
        sent.wait(PAYLOAD_TIMEOUT)
        marked.wait(PAYLOAD_TIMEOUT)

    def receive(self, target: memoryview) -> None:
        received = self._group.recv([as_tensor(target)], self._peer, _PAYLOAD)
        self._group.recv([_byte()], self._peer, _MARK).wait(PAYLOAD_TIMEOUT)
        received.wait(PAYLOAD_TIMEOUT)
        # Nobody waits for the answer. gloo needs it until it has arrived, which shows when the peer
        # sends its next payload.
        self._answer = self._group.send([_byte()], self._peer, _ANSWER)

    def disconnect(self) -> None:
        disconnect(self._group)


def disconnect(group: Any) -> None:
    """End a group of two ranks: gloo has no call for it, but a time-out closes the connection."""
    with contextlib.suppress(RuntimeError):  # the time-out; or it is closed already
        group.recv([_byte()], 1 - group.rank(), _NOTHING).wait(_AT_ONCE)


def _byte() -> Tensor:
    return torch.zeros(1, dtype=torch.uint8)
