"""What a worker tells its routers of its prefix cache: all of it once, then what has changed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pagewire.engine.prefix_cache import PrefixCache
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.effects import Emit

_MAX_HASHES = 4096  # of each kind in one message: at most 144 KiB with their framing


@dataclass(slots=True)
class _Stream:
    """The messages to one router since its last snapshot."""

    epoch: int
    next_seq: int = 0


class CacheReports:
    """Keeps every router's picture of one cache up to date. Pure."""

    def __init__(self, cache: PrefixCache, incarnation: bytes) -> None:
        self._cache = cache
        self._incarnation = incarnation
        self._streams: dict[bytes, _Stream] = {}  # by incarnation of the router
        self._num_epochs = 0

    def forget(self, router: bytes) -> None:
        """A router is gone or has lost track: the next report to it starts with everything."""
        self._streams.pop(router, None)

    def report(self, routers: Iterable[bytes]) -> list[Emit]:
        """What `routers`, all that have a session now, do not know yet."""
        changes = self._cache.take_changes()
        previous, self._streams = self._streams, {}
        effects: list[Emit] = []
        for router in routers:
            stream = previous.get(router)
            if stream is None:
                self._num_epochs += 1
                stream = _Stream(self._num_epochs)
                deltas = _deltas(stream, self._cache.hashes(), ())
            else:
                deltas = _deltas(stream, changes.stored, changes.removed)
            self._streams[router] = stream
            route = pb.Route(sender=self._incarnation, receiver=router)
            effects += (Emit(event=pb.WorkerEvent(route=route, kv_delta=each)) for each in deltas)
        return effects


def _deltas(
    stream: _Stream, stored: Sequence[bytes], removed: Sequence[bytes]
) -> Iterator[pb.KvDelta]:
    """Messages of bounded size; none without news, unless they begin an epoch."""
    length = max(len(stored), len(removed), 0 if stream.next_seq else 1)
    for start in range(0, length, _MAX_HASHES):
        yield pb.KvDelta(
            epoch=stream.epoch,
            seq=stream.next_seq,
            stored=stored[start : start + _MAX_HASHES],
            removed=removed[start : start + _MAX_HASHES],
        )
        stream.next_seq += 1
