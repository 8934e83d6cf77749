"""Messages over UCX: shared memory on one machine, RDMA or TCP between machines.

A TCP connection beside UCX carries headers, and each payload is announced there. Where both ends
keep their pages on GPUs and their UCX can move them, payloads go from GPU to GPU.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from enum import IntEnum

from pagewire.kv_transfer.announced import AnnouncedConnection
from pagewire.kv_transfer.handshake import HandshakeError, Hello
from pagewire.kv_transfer.socket_transport import SocketTransport
from pagewire.kv_transfer.transport import Handler, TransferStats, TransportError
from pagewire.kv_transfer.ucx_library import UcxLibrary, open_library
from pagewire.kv_transfer.ucx_link import UcxLink

logger = logging.getLogger(__name__)

SettleDevice = Callable[[], None]


class Payloads(IntEnum):
    """What a worker offers to a peer, in the first byte of its note."""

    HOST = 0  # host memory, with a CRC-32 in the headers of frames
    GPU = 1  # the memory of its GPU, with the checksum that is made there


class _UcxOpening:
    """Holds the UCX worker of a connection that is being made."""

    def __init__(
        self,
        library: UcxLibrary,
        *,
        handler: Handler,
        stats: TransferStats,
        settle_device: SettleDevice | None,
    ) -> None:
        self._is_on_gpu = settle_device is not None
        self._offer = Payloads.HOST
        if self._is_on_gpu and library.moves_gpu_memory:
            self._offer = Payloads.GPU
        self._link = UcxLink(library, settle_device=settle_device)
        self._handler = handler
        self._stats = stats

    @property
    def note(self) -> bytes:
        return bytes([self._offer]) + self._link.address

    async def finish(self, sock: socket.socket, hello: Hello) -> AnnouncedConnection:
        offers = (self._offer, _offer_of(hello))
        await self._link.connect(hello.note[1:])
        reader, writer = await asyncio.open_connection(sock=sock)
        is_direct = offers == (Payloads.GPU, Payloads.GPU)
        if self._is_on_gpu:
            logger.info("ucx to %s: %s", hello.sender.hex()[:8], _explain(*offers))
        return AnnouncedConnection(
            reader,
            writer,
            self._link,
            peer=hello.sender,
            handler=self._handler,
            stats=self._stats,
            device_link=self._link if is_direct else None,
        )

    def abandon(self) -> None:
        self._link.close()


def _offer_of(hello: Hello) -> Payloads:
    """Raises HandshakeError for a note that says nothing that this worker knows."""
    try:
        return Payloads(hello.note[0])
    except (IndexError, ValueError) as error:
        raise HandshakeError(
            "the peer's note does not say what its payloads are; run the same release on both"
        ) from error


def _explain(mine: Payloads, theirs: Payloads) -> str:
    """Which way pages on this worker's GPU go, and why."""
    if mine is Payloads.HOST:
        return (
            "pages go through pinned host memory, since UCX has no CUDA here; "
            "see UCX on GPUs in `pagewire doctor`"
        )
    if theirs is Payloads.HOST:
        return (
            "pages go through pinned host memory, since the peer has them there or its UCX has "
            "no CUDA"
        )
    return "pages go from GPU to GPU"


class UcxTransport(SocketTransport[AnnouncedConnection]):
    """Carries headers over TCP and payloads over UCX."""

    kind = "ucx"

    def __init__(
        self,
        *,
        incarnation: bytes,
        handler: Handler,
        host: str,
        settle_device: SettleDevice | None = None,
    ) -> None:
        """`settle_device`: of a worker with its pages on a GPU; see UcxLink."""
        super().__init__(incarnation=incarnation, handler=handler, host=host)
        self._settle_device = settle_device
        self._library: UcxLibrary | None = None

    async def start(self) -> None:
        self._library = await asyncio.to_thread(
            open_library, self._host, on_gpu=self._settle_device is not None
        )
        await super().start()

    async def close(self) -> None:
        await super().close()
        self._library = None

    def _open(self) -> _UcxOpening:
        if self._library is None:
            raise TransportError("the ucx transport is not started")
        return _UcxOpening(
            self._library,
            handler=self._handler,
            stats=self.stats,
            settle_device=self._settle_device,
        )
