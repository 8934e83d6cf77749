"""What makes process groups of two ranks over NCCL, torch.distributed's library for GPU memory.

The only module that calls CUDA for transfers. NCCL cannot take one operation back: aborting its
communicators is all there is, so a pair is torn down as a whole and connects again.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore

from pagewire.kv_transfer.exposure import is_loopback
from pagewire.kv_transfer.group_link import GroupLink
from pagewire.kv_transfer.nccl import require_gpu
from pagewire.kv_transfer.pair_store import PairStore, join_group
from pagewire.kv_transfer.staged_group import StagedGroup
from pagewire.kv_transfer.transport import TransportError

_TIMEOUT = timedelta(seconds=60)


class NcclDevice:
    """One GPU, and the groups of the pairs that move its memory.

    Raises TransportError, with a remedy, where there is no NCCL or no such GPU.
    """

    def __init__(self, host: str, device: str) -> None:
        """NCCL opens ports of its own: with a loopback address as `host` only there."""
        require_nccl(device)
        # Neither has type information for what is used here.
        self._nccl: Any = torch.distributed.ProcessGroupNCCL
        self._cuda: Any = torch.cuda
        self._device = device
        # A pair that fails shall end its connection, and not the process of all the others.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        if is_loopback(host):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")

    @property
    def version(self) -> bytes:
        """Both ends must have the same: NCCL's connections have no version of their own."""
        nccl = ".".join(map(str, self._cuda.nccl.version()))
        return f"{torch.__version__.partition('+')[0]} nccl {nccl}".encode()

    async def link(self, sock: socket.socket, rank: int) -> GroupLink:
        """The way of payloads to the process at the other end of `sock`, as rank 0 or 1 of two.

        Both ends call this. Raises TransportError, OSError.
        """
        return GroupLink(await join_group(sock, partial(self._join, rank)), "nccl")

    def _join(self, rank: int, store: PairStore) -> StagedGroup:
        groups = [self._new_group(PrefixStore(f"from {source}", store), rank) for source in (0, 1)]
        group = StagedGroup(
            outgoing=groups[rank],
            incoming=groups[1 - rank],
            device=self._device,
            stream=self._stream,
            abort=lambda each: each.abort(),
        )
        try:
            group.connect()
        except RuntimeError as error:
            group.disconnect()
            raise TransportError(
                f"NCCL cannot reach the peer: {error}; set NCCL_SOCKET_IFNAME to the interface "
                "that both machines share, or use ucx or tcp"
            ) from error
        return group

    def _new_group(self, store: PrefixStore, rank: int) -> Any:
        options = self._nccl.Options()
        options._timeout = _TIMEOUT
        return self._nccl(store, rank, 2, options)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """A stream of its own for each call: on one, a send would keep a receive from beginning."""
        stream = self._cuda.Stream(self._device)
        with self._cuda.stream(stream):
            yield
        stream.synchronize()


def require_nccl(device: str) -> None:
    """Raise TransportError, with a remedy, unless NCCL can move the memory of `device`."""
    require_gpu(device)
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        raise TransportError(
            "this build of torch has no NCCL; install one with CUDA, or use shm, ucx or tcp"
        )
    if not torch.cuda.is_available():
        raise TransportError(
            "nccl needs a CUDA device, and torch finds none; check nvidia-smi and the driver, or "
            "use shm, ucx or tcp"
        )
