"""What a router knows of the prefix cache of one worker. Pure.

It may be a heartbeat old or lost altogether: it decides where a request goes, never what it gets.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pagewire.proto import worker_pb2 as pb

PageHashes = Mapping[int, Sequence[bytes]]  # of a prompt's full pages, for each page size
NO_HASHES: PageHashes = MappingProxyType({})


class CachedPages:
    """Follows the KvDelta messages of one worker."""

    def __init__(self) -> None:
        self._hashes: set[bytes] = set()
        self._epoch = 0
        self._next_seq: int | None = None  # None: lost track

    def apply(self, delta: pb.KvDelta) -> bool:
        """Take a message in; False when one before it is missing, and a snapshot is needed."""
        if delta.epoch > self._epoch and delta.seq == 0:
            self._hashes.clear()
            self._epoch, self._next_seq = delta.epoch, 0
        if self._is_repeated(delta):
            return True
        if (delta.epoch, delta.seq) != (self._epoch, self._next_seq):
            self._hashes.clear()
            self._next_seq = None
            return False
        self._hashes.update(delta.stored)
        self._hashes.difference_update(delta.removed)
        self._next_seq = delta.seq + 1
        return True

    def num_leading(self, hashes: Sequence[bytes]) -> int:
        """How many of the first pages with `hashes` the worker has."""
        for index, hash in enumerate(hashes):
            if hash not in self._hashes:
                return index
        return len(hashes)

    def _is_repeated(self, delta: pb.KvDelta) -> bool:
        if delta.epoch != self._epoch:
            return delta.epoch < self._epoch
        return self._next_seq is not None and delta.seq < self._next_seq
