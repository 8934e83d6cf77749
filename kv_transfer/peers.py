"""The open connections of one transport, by peer, and what its Handler hears about them."""

from typing import Generic, TypeVar

from pagewire.kv_transfer.transport import Connection, Handler

ConnectionT = TypeVar("ConnectionT", bound=Connection)


class Peers(Generic[ConnectionT]):
    """Knows every open connection, and tells the Handler when the last one to a peer has ended.

    There are two to the same peer when both ends connected at the same time. They fall together:
    so the one `lost` settles every buffer that was placed for that peer.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._connections: dict[bytes, list[ConnectionT]] = {}

    def get(self, peer: bytes) -> ConnectionT | None:
        """The oldest connection to `peer`."""
        connections = self._connections.get(peer)
        return connections[0] if connections else None

    def all(self) -> list[ConnectionT]:
        return [item for connections in self._connections.values() for item in connections]

    def add(self, connection: ConnectionT) -> None:
        self._connections.setdefault(connection.peer, []).append(connection)

    def remove(self, connection: ConnectionT, reason: str) -> None:
        """Forget `connection`, whose end has released every buffer."""
        connections = self._connections[connection.peer]
        connections.remove(connection)
        if connections:
            for other in connections:
                other.close()
            return
        del self._connections[connection.peer]
        self._handler.lost(connection.peer, reason)


def place(handler: Handler, peer: bytes, header: bytes, num_bytes: int) -> memoryview | None:
    """Ask `handler` for the place of a payload and check it, so that none is ever overrun.

    Raises ValueError when the place has another size: a bug of the handler.
    """
    view = handler.place(peer, header, num_bytes)
    if view is None:
        return None
    if view.nbytes != num_bytes:
        raise ValueError(f"place returned {view.nbytes} bytes for a payload of {num_bytes}")
    return view.cast("B")
