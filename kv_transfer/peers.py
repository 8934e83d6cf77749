"""The open connections of one transport: they are run here, and here they end.

Whatever ends a connection, its buffers are released first and the Handler hears of it last.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.transport import Connection, Handler, TransferStats

CLOSED_HERE = "closed by this worker"

logger = logging.getLogger(__name__)


class RunningConnection(Connection, Protocol):
    """A Connection that its transport runs."""

    closed_here: bool  # this end called close

    async def run(self) -> str:
        """Receive until the connection ends, and return the reason.

        What a callback of the Handler raises comes out of here.
        """

    async def release(self) -> None:
        """Free everything. Afterwards no placed buffer is written, and every send has ended."""


ConnectionT = TypeVar("ConnectionT", bound=RunningConnection)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served(Generic[ConnectionT]):
    """A connection and the task that runs it."""

    connection: ConnectionT
    task: asyncio.Task[None]


class Peers(Generic[ConnectionT]):
    """Runs connections, and tells the Handler when the last one to a peer has ended.

    There are two to the same peer when both ends connected at the same time. They fall together:
    so the one `lost` settles every buffer that was placed for that peer. A peer that connects a
    second time has given up what it had: that ends before the new connection begins.
    """

    def __init__(self, *, handler: Handler, stats: TransferStats) -> None:
        self._handler = handler
        self._stats = stats
        self._connections: dict[bytes, list[ConnectionT]] = {}
        self._accepted: dict[bytes, _Served[ConnectionT]] = {}  # the last that each peer made
        self._tasks: set[asyncio.Task[None]] = set()

    def get(self, peer: bytes) -> ConnectionT | None:
        """The newest connection to `peer`: an older one may be dead without knowing it."""
        connections = self._connections.get(peer)
        return connections[-1] if connections else None

    def accept(self, connection: ConnectionT) -> None:
        """Run `connection`, which its peer made, to its end, in a task."""
        task = self.serve(connection)
        self._accepted[connection.peer] = _Served(connection=connection, task=task)

    async def end_accepted(self, peer: bytes) -> None:
        """End the connection that `peer` made before; the Handler has heard of it afterwards.

        It may be dead without knowing it, and would take a new one down when it notices.
        """
        before = self._accepted.pop(peer, None)
        if before is not None:
            before.connection.close()
            await asyncio.wait([before.task])

    def serve(self, connection: ConnectionT) -> asyncio.Task[None]:
        """Run `connection`, which this end made, to its end, in a task."""
        self._connections.setdefault(connection.peer, []).append(connection)
        task = asyncio.create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_failure)
        return task

    async def close(self) -> None:
        """End all connections; the Handler hears of each peer before this returns."""
        for connections in self._connections.values():
            for connection in connections:
                connection.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, connection: ConnectionT) -> None:
        reason = "a callback of this worker failed; its log has the traceback"
        try:
            reason = await connection.run()
        finally:
            if not connection.closed_here:
                self._stats.failures += 1
            await connection.release()
            self._remove(connection, reason)

    def _remove(self, connection: ConnectionT, reason: str) -> None:
        accepted = self._accepted.get(connection.peer)
        if accepted is not None and accepted.connection is connection:
            del self._accepted[connection.peer]
        others = self._connections[connection.peer]
        others.remove(connection)
        for other in others:
            other.close()
        if not others:
            del self._connections[connection.peer]
            self._handler.lost(connection.peer, reason)


def _log_failure(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        logger.error("a connection ended because a callback failed", exc_info=error)


def place(handler: Handler, peer: bytes, header: bytes, num_bytes: int) -> Landing | None:
    """Ask `handler` for the place of a payload and check it, so that none is ever overrun.

    Raises ValueError when the place has another size: a bug of the handler.
    """
    landing = handler.place(peer, header, num_bytes)
    if landing is not None and landing.num_bytes != num_bytes:
        raise ValueError(f"place returned {landing.num_bytes} bytes for a payload of {num_bytes}")
    return landing
