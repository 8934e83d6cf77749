"""What makes process groups of two ranks over gloo, torch.distributed's library for CPU memory.

The groups are made by hand, one per pair of workers: torch.distributed's own functions keep one
default group per process, which all ranks would have to join at once.
"""

import socket
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from pagewire.kv_transfer.gloo_group import GlooGroup
from pagewire.kv_transfer.group_link import GroupLink
from pagewire.kv_transfer.pair_store import PairStore, join_group
from pagewire.kv_transfer.transport import TransportError

_CONNECT_TIMEOUT = timedelta(seconds=5)


class GlooDevice:
    """One network interface, and a thread that moves the bytes of all groups there.

    Raises TransportError when this torch has no gloo, or this machine not the address `host`.
    """

    def __init__(self, host: str) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
            raise TransportError("this build of torch has no gloo; use tcp")
        # Its type information leaves out most of what is used here.
        self._gloo: Any = torch.distributed.ProcessGroupGloo
        try:
            self._device = self._gloo.create_device(hostname=host, lazy_init=False)
        except RuntimeError as error:
            raise TransportError(
                f"gloo cannot use host {host!r}: {error}; give an address that this machine has"
            ) from error

    @property
    def version(self) -> bytes:
        """Both ends must have the same: gloo's messages have no version of their own."""
        return torch.__version__.partition("+")[0].encode()

    async def link(self, sock: socket.socket, rank: int) -> GroupLink:
        """The way of payloads to the process at the other end of `sock`; as `group`."""
        return GroupLink(GlooGroup(await self.group(sock, rank)), "gloo")

    async def group(self, sock: socket.socket, rank: int) -> Any:
        """A process group with the process at the other end of `sock`, as rank 0 or 1 of two.

        Both ends call this. Raises TransportError, OSError.
        """
        return await join_group(sock, partial(self._new_group, rank))

    def _new_group(self, rank: int, store: PairStore) -> Any:
        options = self._gloo._Options()
        options._devices = [self._device]
        options._timeout = _CONNECT_TIMEOUT
        options._threads = 1  # for operations of the whole group, of which there are none
        try:
            return self._gloo(store, rank, 2, options)
        except RuntimeError as error:
            raise TransportError(f"gloo cannot reach the peer: {error}") from error
