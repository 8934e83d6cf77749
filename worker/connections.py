"""How a worker is connected to its peers: over which transport, and when over another.

The end that connects has a breaker for each pair. While a pair uses a transport that is not its
best, the better one is tried again beside it; the pair moves when no hand-off is under way.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from pagewire.kv_transfer.breaker import Breaker
from pagewire.kv_transfer.candidates import Candidate, candidates
from pagewire.kv_transfer.circuit import CircuitEvent, CircuitLimits, CircuitState
from pagewire.kv_transfer.one_connection import OneConnection
from pagewire.kv_transfer.transport import Connection, Transport, TransportError
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.tasks import Spawn

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Pair:
    """One peer that this worker has connected to."""

    breaker: Breaker
    ways: Mapping[str, Candidate]  # by kind, best first
    kind: str | None = None  # in use
    spare: str | None = None  # a better one, which is connected too
    is_probing: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.ways)


class Connections:
    """Makes and ends connections; each peer has one that counts."""

    def __init__(
        self,
        *,
        transports: Sequence[Transport],
        pairs: OneConnection | None,
        has_handoff: Callable[[bytes], bool],
        spawn: Spawn,
        clock: Callable[[], float],
        limits: CircuitLimits,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        """`pairs` is what the transports call; it may be None where there is one of them.

        `has_handoff` says whether one with a peer is under way.
        """
        self.transports: Mapping[str, Transport] = {item.kind: item for item in transports}
        self._followed = pairs
        self._has_handoff = has_handoff
        self._spawn = spawn
        self._clock = clock
        self._limits = limits
        self._sleep = sleep
        self._pairs: dict[bytes, _Pair] = {}
        self.num_trips: dict[str, int] = dict.fromkeys(self.transports, 0)  # by kind, of all pairs

    def get(self, peer: bytes) -> Connection | None:
        """The open connection to `peer` that counts."""
        pair = self._pairs.get(peer)
        if pair is not None:
            return self._open(peer, pair.kind)
        if self._followed is not None:
            return self._open(peer, self._followed.kind(peer))
        found = (transport.connection(peer) for transport in self.transports.values())
        return next((connection for connection in found if connection is not None), None)

    async def connect(self, peer: bytes, addresses: tuple[tuple[str, bytes], ...]) -> None:
        """Make sure of a connection over the best transport that may be used.

        Raises TransportError when none works.
        """
        if self.get(peer) is not None:
            return
        pair = self._pair(peer, addresses)
        attempts = pair.breaker.attempts(pair.kinds, self._clock())
        if attempts.wait_s:
            logger.info(
                "%s to %s is the only way left; trying again in %.1f s",
                attempts.kinds[0],
                _name(peer),
                attempts.wait_s,
            )
            await self._sleep(attempts.wait_s)
        await self._connect_over_first(peer, pair, attempts.kinds)

    def give_up(self, peer: bytes) -> None:
        """Close the connection to `peer`, on which a hand-off stalled; its loss is reported."""
        pair = self._pairs.get(peer)
        if pair is not None and pair.kind is not None:
            self._report(peer, pair, pair.kind, CircuitEvent.STALLED)
        self.close(peer)

    def close(self, peer: bytes) -> None:
        """Close whatever connects to `peer`; the transport then reports the loss."""
        connection = self.get(peer)
        if connection is not None:
            connection.close()

    def on_lost(self, peer: bytes) -> None:
        """The connection to `peer` has ended."""
        pair = self._pairs.get(peer)
        if pair is not None and pair.kind is not None:
            self._report(peer, pair, pair.kind, CircuitEvent.LOST)
            pair.kind = None

    def improve(self) -> None:
        """Move pairs to a better transport, where one works again and nothing is in the way."""
        for peer, pair in self._pairs.items():
            if pair.kind in (None, pair.kinds[0]):
                continue
            if pair.spare is not None:
                self._move(peer, pair, pair.spare)
            elif not pair.is_probing:
                kind = pair.breaker.better(pair.kind, pair.kinds, self._clock())
                if kind is not None:
                    pair.is_probing = True
                    self._spawn(self._probe(peer, pair, kind))

    def states(self) -> list[pb.KvLink]:
        """The pairs that have a connection, and what was given up for each."""
        return [
            pb.KvLink(
                peer=peer,
                transport=pair.kind,
                given_up=self._given_up(pair),
            )
            for peer, pair in self._pairs.items()
            if pair.kind is not None
        ]

    async def shut_down(self) -> None:
        """Close every transport."""
        for transport in self.transports.values():
            await transport.close()

    def _open(self, peer: bytes, kind: str | None) -> Connection | None:
        return None if kind is None else self.transports[kind].connection(peer)

    def _pair(self, peer: bytes, addresses: tuple[tuple[str, bytes], ...]) -> _Pair:
        ways = {way.transport.kind: way for way in candidates(self.transports, addresses)}
        pair = self._pairs.get(peer)
        if pair is None:
            self._forget_old_pairs()
            pair = self._pairs[peer] = _Pair(breaker=Breaker(self._limits), ways=ways)
        pair.ways = ways
        return pair

    def _forget_old_pairs(self) -> None:
        """Workers that were replaced never come back under their incarnation."""
        now = self._clock()
        for peer, pair in list(self._pairs.items()):
            if pair.kind is None and not pair.is_probing and pair.breaker.may_forget(now):
                del self._pairs[peer]

    async def _connect_over_first(self, peer: bytes, pair: _Pair, kinds: Sequence[str]) -> None:
        *others, last = kinds
        for kind in others:
            try:
                await self._try(peer, pair, kind)
            except TransportError as error:
                logger.warning("%s to %s: %s", kind, _name(peer), error)
            else:
                self._use(peer, pair, kind)
                return
        await self._try(peer, pair, last)
        self._use(peer, pair, last)

    async def _try(self, peer: bytes, pair: _Pair, kind: str) -> None:
        """Connect over `kind`. Raises TransportError."""
        way = pair.ways[kind]
        self._report(peer, pair, kind, CircuitEvent.TRIED)
        try:
            await way.transport.connect(peer, way.address)
        except TransportError:
            self._report(peer, pair, kind, CircuitEvent.REFUSED)
            raise
        self._report(peer, pair, kind, CircuitEvent.CONNECTED)

    def _use(self, peer: bytes, pair: _Pair, kind: str) -> None:
        pair.kind = kind
        pair.spare = None
        if self._followed is not None:
            self._followed.use(peer, kind)
        given_up = [
            f"{each.transport} was given up ({each.cause})" for each in self._given_up(pair)
        ]
        reason = "; ".join(given_up) or pair.ways[kind].reason
        logger.info("KV frames to %s go over %s: %s", _name(peer), kind, reason)

    def _given_up(self, pair: _Pair) -> list[pb.GivenUp]:
        """The transports that are not used for a time."""
        now = self._clock()
        return [
            pb.GivenUp(
                transport=kind,
                cause=circuit.cause or "",
                retry_in_s=max(0.0, circuit.cooled_down_at(self._limits) - now),
            )
            for kind, circuit in pair.breaker.circuits.items()
            if circuit.state is not CircuitState.CLOSED
        ]

    async def _probe(self, peer: bytes, pair: _Pair, kind: str) -> None:
        """See whether `kind` works again, beside the connection in use."""
        try:
            await self._try(peer, pair, kind)
        except TransportError as error:
            logger.info("%s to %s does not work yet: %s", kind, _name(peer), error)
        else:
            pair.spare = kind
            self._move(peer, pair, kind)
        finally:
            pair.is_probing = False

    def _move(self, peer: bytes, pair: _Pair, kind: str) -> None:
        """Use the spare connection, unless a hand-off needs the other or it has ended."""
        if self._open(peer, kind) is None:
            pair.spare = None
            self._report(peer, pair, kind, CircuitEvent.LOST)
        elif not self._has_handoff(peer):
            before = self.get(peer)
            self._use(peer, pair, kind)
            if before is not None:
                before.close()

    def _report(self, peer: bytes, pair: _Pair, kind: str, event: CircuitEvent) -> None:
        if pair.breaker.report(kind, event, self._clock()):
            self.num_trips[kind] += 1
            logger.warning("%s to %s is given up for a time: %s", kind, _name(peer), event)


def _name(peer: bytes) -> str:
    """The start of an incarnation, as logs have it."""
    return peer.hex()[:8]
