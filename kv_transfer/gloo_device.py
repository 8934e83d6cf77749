"""What makes process groups of two ranks over gloo, torch.distributed's library for CPU memory.

The groups are made by hand, one per pair of workers: torch.distributed's own functions keep one
default group per process, which all ranks would have to join at once.
"""

import asyncio
import socket
from datetime import timedelta
from typing import Any

import torch

from pagewire.kv_transfer.gloo_link import GlooLink
from pagewire.kv_transfer.gloo_store import PairStore
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

    async def link(self, sock: socket.socket, rank: int) -> GlooLink:
        """The way of payloads to the process at the other end of `sock`; as `group`."""
        return GlooLink(await self.group(sock, rank))

    async def group(self, sock: socket.socket, rank: int) -> Any:
        """A process group with the process at the other end of `sock`, as rank 0 or 1 of two.

        Both ends call this. Raises TransportError, OSError.
        """
        store = PairStore(sock)
        receiving = asyncio.create_task(store.receive())
        try:
            group = await asyncio.to_thread(self._new_group, store, rank)
            await store.finish()
            await receiving
        finally:
            store.close()
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
        return group

    def _new_group(self, store: PairStore, rank: int) -> Any:
        options = self._gloo._Options()
        options._devices = [self._device]
        options._timeout = _CONNECT_TIMEOUT
        options._threads = 1  # for operations of the whole group, of which there are none
        try:
            return self._gloo(store, rank, 2, options)
        except RuntimeError as error:
            raise TransportError(f"gloo cannot reach the peer: {error}") from error
