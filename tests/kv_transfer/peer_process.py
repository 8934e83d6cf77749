"""The other end of the tests that need a second process; they start it as a script.

Arguments: transport kind, and what to do: `echo` sends every message back; `stream` sends messages
without end from its first on; `swallow` takes messages and does nothing. Prints its incarnation
and address, and ends when its standard input does.
"""

import asyncio
import os
import sys
from collections.abc import Coroutine
from itertools import count

from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.select import create_transports
from pagewire.kv_transfer.transport import ConnectionLost, Transport

STREAM_BYTES = 4 << 20


class Peer:
    """Answers messages in tasks, in the order in which they came."""

    def __init__(self, incarnation: bytes, kind: str, behaviour: str) -> None:
        self.transport: Transport = create_transports(
            kind, incarnation, self, "127.0.0.1"
        ).transports[0]
        self._behaviour = behaviour
        self._places: dict[bytes, bytearray] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def place(self, peer: bytes, header: bytes, length: int) -> Landing:
        self._places[header] = bytearray(length)
        return Landing(memoryview(self._places[header]))

    def deliver(self, peer: bytes, header: bytes) -> None:
        payload = self._places.pop(header, bytearray())
        if self._behaviour == "echo":
            self._start(self._echo(peer, header, payload))
        elif self._behaviour == "stream" and not self._tasks:
            self._start(self._stream(peer))

    def lost(self, peer: bytes, reason: str) -> None:
        self._places.clear()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _echo(self, peer: bytes, header: bytes, payload: bytearray) -> None:
        connection = self.transport.connection(peer)
        if connection is not None:
            await connection.send(header, memoryview(payload))

    async def _stream(self, peer: bytes) -> None:
        connection = self.transport.connection(peer)
        assert connection is not None
        payload = memoryview(os.urandom(STREAM_BYTES))
        numbers = count()

        async def send_some() -> None:
            for number in numbers:
                await connection.send(b"%d" % number, payload)

        try:
            await asyncio.gather(*(send_some() for _ in range(4)))
        except ConnectionLost:
            return


async def main(kind: str, behaviour: str) -> None:
    incarnation = os.urandom(16)
    peer = Peer(incarnation, kind, behaviour)
    await peer.transport.start()
    print(incarnation.hex(), peer.transport.address.decode(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await peer.transport.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
