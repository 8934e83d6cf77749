"""Which prompt chunks a prefill step runs. Pure."""

from collections.abc import Iterator
from typing import NamedTuple

from pagewire.engine.prefix_cache import PrefixCache
from pagewire.kv_transfer.layout import KVLayout
from pagewire.prefill_worker.sequence import PrefillSequence
from pagewire.proto.page_hash import PageKey

# A deadline is at risk when less than this part of the time until it is left.
AT_RISK = 0.25


class Chunk(NamedTuple):
    """The next `num_tokens` tokens of a prompt."""

    sequence: PrefillSequence
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether it ends its prompt; until its step has run."""
        return self.num_tokens == self.sequence.num_remaining


class PrefillScheduler:
    """Chunks of several prompts under one token budget, the most urgent first.

    Lower priority numbers go first; among equals those whose deadline is at risk, the earliest
    first, and then whoever has the fewest tokens left to compute, cached ones not counted: that
    gives the lowest mean time to first token. Whoever has waited for `ageing_s` goes before
    everybody younger, so nobody starves: from then on it waits only for prompts that came before
    it.

    A sequence gets the pages of its whole prompt when it starts, so that what has started can
    always be finished; it starts behind those that the prefix cache has. One that would begin with
    a page that a chunk of the same step computes waits for the next step, where that page is
    cached. While the pool is too full for one, others may start before it, until it has aged.
    Chunks that are not the last of a prompt end on a page boundary, so every chunk completes whole
    pages.
    """

    def __init__(
        self,
        cache: PrefixCache,
        layout: KVLayout,
        max_batch_tokens: int,
        *,
        ageing_s: float = 5.0,
    ) -> None:
        if max_batch_tokens < layout.page_size:
            raise ValueError(
                f"max_batch_tokens is {max_batch_tokens}; it must be at least the page size "
                f"{layout.page_size}"
            )
        self._cache = cache
        self._layout = layout
        self._max_batch_tokens = max_batch_tokens
        self._ageing_s = ageing_s
        self._queue: list[PrefillSequence] = []  # in order of arrival

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def num_queued_tokens(self) -> int:
        return sum(sequence.num_remaining for sequence in self._queue)

    def add(self, sequence: PrefillSequence) -> None:
        self._queue.append(sequence)

    def remove(self, sequence: PrefillSequence) -> None:
        """Forget a sequence that is still queued or partly computed; its pages are the caller's."""
        if sequence in self._queue:
            self._queue.remove(sequence)

    def put_back(self, chunk: Chunk) -> None:
        """The step of a chunk has failed through no fault of its own: it is to run again."""
        if chunk.sequence not in self._queue:
            self._queue.append(chunk.sequence)

    def schedule(self, now: float, *, may_start: bool = True) -> list[Chunk]:
        """Chunks of the next step, at most one a sequence. Allocates pages for those that start.

        Sequences whose last chunk is among them leave the queue. Without `may_start` none starts.
        """
        budget = self._max_batch_tokens
        chunks: list[Chunk] = []
        coming: set[bytes] = set()  # hashes of the pages that these chunks complete
        for sequence in sorted(self._queue, key=lambda item: self._rank(item, now)):
            if not budget:
                break
            if self._begins_in(coming, sequence):
                continue
            if not sequence.pages and not (may_start and self._has_pages(sequence)):
                may_start = may_start and not self._has_aged(sequence, now)
                continue
            num_tokens = self._chunk_tokens(sequence, budget)
            if not num_tokens:
                continue
            chunks.append(Chunk(sequence, num_tokens))
            coming.update(self._hashes(chunks[-1]))
            budget -= num_tokens
        for chunk in chunks:
            if chunk.is_last:
                self._queue.remove(chunk.sequence)
        return chunks

    def _rank(self, sequence: PrefillSequence, now: float) -> tuple[float, ...]:
        """The smallest is the most urgent; equals keep their order of arrival."""
        if self._has_aged(sequence, now):
            return (0, sequence.arrived)
        if sequence.deadline - now < AT_RISK * (sequence.deadline - sequence.arrived):
            return (1, sequence.priority, 0, sequence.deadline)
        return (1, sequence.priority, 1, sequence.num_remaining - self._num_cached(sequence))

    def _has_aged(self, sequence: PrefillSequence, now: float) -> bool:
        return now - sequence.arrived >= self._ageing_s

    def _chunk_tokens(self, sequence: PrefillSequence, budget: int) -> int:
        if sequence.num_remaining <= budget:
            return sequence.num_remaining
        return budget - budget % self._layout.page_size

    def _num_cached(self, sequence: PrefillSequence) -> int:
        """Tokens that a sequence need not compute, should it start now; 0 for those that have."""
        if sequence.pages:
            return 0
        return len(self._cache.lookup(self._reusable(sequence))) * self._layout.page_size

    def _begins_in(self, coming: set[bytes], sequence: PrefillSequence) -> bool:
        """Whether the first page that a sequence would compute, if it started now, is coming."""
        if sequence.pages or not coming:
            return False
        missing = self._reusable(sequence)[self._num_cached(sequence) // self._layout.page_size :]
        return bool(missing) and missing[0].hash in coming

    def _hashes(self, chunk: Chunk) -> Iterator[bytes]:
        """Of the pages that a chunk completes."""
        page_size, start = self._layout.page_size, chunk.sequence.num_computed
        end = start + chunk.num_tokens
        return (key.hash for key in chunk.sequence.page_keys[start // page_size : end // page_size])

    def _reusable(self, sequence: PrefillSequence) -> tuple[PageKey, ...]:
        """The pages of a prompt that may come out of the cache: its last token is computed."""
        return sequence.page_keys[: (len(sequence.token_ids) - 1) // self._layout.page_size]

    def _has_pages(self, sequence: PrefillSequence) -> bool:
        """Whether a sequence could be given the pages of its prompt, cached ones among them."""
        num_pages = self._layout.num_pages(len(sequence.token_ids))
        allocated = self._cache.allocate(self._reusable(sequence), num_pages)
        if allocated is None:
            return False
        sequence.pages = allocated.pages
        sequence.num_cached = allocated.num_hits * self._layout.page_size
        sequence.num_computed = sequence.num_cached
        return True
