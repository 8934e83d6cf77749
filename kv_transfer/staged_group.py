"""Two ranks whose library moves the memory of a device: payloads are staged there.

Bytes go host, device, device, host. What a call leaves behind when it is cut off is in staging
buffers only: a place of the worker is written once all of a payload is here.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from pagewire.kv_transfer.group_link import as_tensor

_TAG = 0

# A stream of the device for the calls of the block; at its end all of them are done.
Stream = Callable[[], AbstractContextManager[None]]


class StagedGroup:
    """A PairGroup over two process groups of the same two ranks, one for each direction.

    With one for both, two ranks that send at once would each wait for the other to receive.
    """

    def __init__(
        self,
        *,
        outgoing: Any,
        incoming: Any,
        device: str,
        stream: Stream,
        abort: Callable[[Any], None],
    ) -> None:
        """`abort` ends the calls of a process group, from another thread than theirs."""
        self._outgoing = outgoing
        self._incoming = incoming
        self._peer = 1 - outgoing.rank()
        self._device = device
        self._stream = stream
        self._abort = abort
        self._writing = threading.Lock()  # a place of the worker, or closing
        self._is_closed = False

    def connect(self) -> None:
        """Send one byte each way, rank 0 first: libraries connect with the first operation.

        So it happens while the ends can still tell each other how. Raises RuntimeError.
        """
        byte = memoryview(bytearray(1))
        for sender in (0, 1):
            if sender == self._peer:
                self.receive(byte)
            else:
                self.send(byte)

    def send(self, payload: memoryview) -> None:
        with self._stream():
            staged = as_tensor(payload).to(self._device)
            self._outgoing.send([staged], self._peer, _TAG).wait()
        self._require_open()

    def receive(self, target: memoryview) -> None:
        with self._stream():
            staged = torch.empty(len(target), dtype=torch.uint8, device=self._device)
            self._incoming.recv([staged], self._peer, _TAG).wait()
        with self._writing:
            self._require_open()
            with self._stream():
                as_tensor(target).copy_(staged)

    def disconnect(self) -> None:
        with self._writing:
            self._is_closed = True
        for group in (self._outgoing, self._incoming):
            self._abort(group)

    def _require_open(self) -> None:
        """Raise RuntimeError after `disconnect`: an aborted call returns as if it had succeeded."""
        if self._is_closed:
            raise RuntimeError("the group was aborted")
