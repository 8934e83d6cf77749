"""Frames through a bare process group of torch.distributed, over gloo.

Without headers, order or an event loop. A socket says when a round begins and ends.
"""

import asyncio
import os
import socket
from collections import deque
from datetime import timedelta
from typing import Any

import torch

from harness.page_lane import FRAME_BYTES, NUM_BUFFERS
from pagewire.kv_transfer.gloo_device import GlooDevice

_DONE = b"done"
_PATIENCE = timedelta(minutes=10)


class BareGloo:
    """One of two ranks."""

    def __init__(self, sock: socket.socket, *, rank: int) -> None:
        self.sock = sock
        sock.setblocking(False)
        self._group = asyncio.run(GlooDevice("127.0.0.1").group(sock, rank))
        sock.setblocking(True)
        self._peer = 1 - rank
        self._buffers = [
            torch.frombuffer(bytearray(os.urandom(FRAME_BYTES)), dtype=torch.uint8)
            for _ in range(NUM_BUFFERS)
        ]

    def move(self, num_frames: int, *, sending: bool) -> None:
        """Send or receive so many frames, NUM_BUFFERS at a time."""
        start = self._group.send if sending else self._group.recv
        under_way: deque[Any] = deque()
        for number in range(num_frames):
            if len(under_way) == NUM_BUFFERS:
                under_way.popleft().wait(_PATIENCE)
            under_way.append(start([self._buffers[number % NUM_BUFFERS]], self._peer, 0))
        for work in under_way:
            work.wait(_PATIENCE)


class BareGlooLane:
    """The sending end."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._gloo = BareGloo(socket.create_connection((host, int(port))), rank=0)

    def send(self, num_frames: int) -> None:
        self._gloo.sock.sendall(num_frames.to_bytes(4, "big"))
        self._gloo.move(num_frames, sending=True)
        assert self._gloo.sock.recv(len(_DONE)) == _DONE

    def close(self) -> None:
        self._gloo.sock.close()


def receive_bare_gloo(sock: socket.socket) -> None:
    gloo = BareGloo(sock, rank=1)
    while count := sock.recv(4, socket.MSG_WAITALL):
        gloo.move(int.from_bytes(count, "big"), sending=False)
        sock.sendall(_DONE)
