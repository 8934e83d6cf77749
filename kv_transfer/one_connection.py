"""Lets a worker see one connection to each peer, though it has several transports.

A peer that gives one transport up connects over another, while this end may still take the first
for alive. Which one counts is the choice of the end that connects; the other follows its messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pagewire.kv_transfer.landing import Landing
from pagewire.kv_transfer.transport import Handler, Transport


@dataclass(slots=True, kw_only=True)
class _Pair:
    """What counts between this worker and one peer."""

    kind: str
    is_own_choice: bool
    successor: str | None = None  # the peer has moved there; the connection before is ending
    held: list[bytes] = field(default_factory=list)  # messages over the successor, until it has


class OneConnection:
    """Handlers of several transports in front of the one Handler of a worker.

    The worker gets what comes over the connection that counts, and `lost` when that one has ended:
    then nothing writes to a buffer of `place` any more, since no other connection is given one.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._pairs: dict[bytes, _Pair] = {}
        self._transports: dict[str, Transport] = {}

    def lane(self, kind: str) -> Handler:
        """The Handler of the transport of this kind."""
        return _Lane(self, kind)

    def join(self, transports: Sequence[Transport]) -> None:
        """Name the transports whose Handlers were made here."""
        self._transports = {transport.kind: transport for transport in transports}

    def kind(self, peer: bytes) -> str | None:
        """The transport of the connection to `peer` that counts."""
        pair = self._pairs.get(peer)
        return None if pair is None else pair.kind

    def use(self, peer: bytes, kind: str) -> None:
        """From now on the connection over `kind` counts, which this end has made.

        Another one can be closed: its end is nobody's concern.
        """
        self._pairs[peer] = _Pair(kind=kind, is_own_choice=True)

    def place(self, kind: str, peer: bytes, header: bytes, length: int) -> Landing | None:
        if self._follow(kind, peer).kind != kind:
            return None
        return self._handler.place(peer, header, length)

    def deliver(self, kind: str, peer: bytes, header: bytes) -> None:
        pair = self._follow(kind, peer)
        if pair.kind == kind:
            self._handler.deliver(peer, header)
        elif pair.successor == kind:
            pair.held.append(header)

    def lost(self, kind: str, peer: bytes, reason: str) -> None:
        pair = self._pairs.get(peer)
        if pair is not None and pair.kind != kind:
            if pair.successor == kind:
                pair.successor = None
                pair.held.clear()
            return
        self._pairs.pop(peer, None)
        self._handler.lost(peer, reason)
        if pair is not None and pair.successor is not None:
            self._pairs[peer] = _Pair(kind=pair.successor, is_own_choice=False)
            for header in pair.held:
                self._handler.deliver(peer, header)

    def _follow(self, kind: str, peer: bytes) -> _Pair:
        """The pair, after something came from `peer` over `kind`."""
        pair = self._pairs.get(peer)
        if pair is None:
            pair = self._pairs[peer] = _Pair(kind=kind, is_own_choice=False)
        if pair.kind != kind and not pair.is_own_choice and pair.successor != kind:
            pair.successor = kind
            pair.held.clear()
            self._end(pair.kind, peer)
        return pair

    def _end(self, kind: str, peer: bytes) -> None:
        connection = self._transports[kind].connection(peer)
        if connection is not None:
            connection.close()


@dataclass(frozen=True, slots=True)
class _Lane:
    """What one transport calls."""

    pairs: OneConnection
    kind: str

    def place(self, peer: bytes, header: bytes, length: int) -> Landing | None:
        return self.pairs.place(self.kind, peer, header, length)

    def deliver(self, peer: bytes, header: bytes) -> None:
        self.pairs.deliver(self.kind, peer, header)

    def lost(self, peer: bytes, reason: str) -> None:
        self.pairs.lost(self.kind, peer, reason)
