"""A transport as over a slow link: payloads leave at a given rate, one after the other."""

import asyncio
import time

from pagewire.kv_transfer.transport import Connection, Transport


class SlowTransport:
    """A Transport around another one; all its connections share one link."""

    def __init__(self, transport: Transport, *, bytes_per_s: float) -> None:
        self.kind = transport.kind
        self.stats = transport.stats
        self._transport = transport
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0  # when the link has carried all that it was given

    @property
    def address(self) -> bytes:
        return self._transport.address

    async def start(self) -> None:
        await self._transport.start()

    def obstacle(self, address: bytes) -> str | None:
        return self._transport.obstacle(address)

    async def connect(self, peer: bytes, address: bytes) -> Connection:
        return _SlowConnection(await self._transport.connect(peer, address), self)

    def connection(self, peer: bytes) -> Connection | None:
        found = self._transport.connection(peer)
        return None if found is None else _SlowConnection(found, self)

    async def close(self) -> None:
        await self._transport.close()

    async def carry(self, num_bytes: int) -> None:
        """Wait until so many bytes behind those before them have passed the link."""
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + num_bytes / self._bytes_per_s
        await asyncio.sleep(self._free_at - now)


class _SlowConnection:
    """One connection over the link."""

    on_device = None

    def __init__(self, connection: Connection, link: SlowTransport) -> None:
        self._connection = connection
        self._link = link

    @property
    def peer(self) -> bytes:
        return self._connection.peer

    async def send(self, header: bytes, *payload: memoryview) -> None:
        await self._link.carry(sum(len(part) for part in payload))
        await self._connection.send(header, *payload)

    def close(self) -> None:
        self._connection.close()
