"""Which prompt chunks a prefill step runs. Pure."""

from collections import deque
from typing import NamedTuple

from pagewire.engine.prefix_cache import PrefixCache
from pagewire.kv_transfer.layout import KVLayout
from pagewire.prefill_worker.sequence import PrefillSequence


class Chunk(NamedTuple):
    """The next `num_tokens` tokens of a prompt."""

    sequence: PrefillSequence
    num_tokens: int


class PrefillScheduler:
    """First come, first served, in chunks under a token budget.

    A sequence gets the pages of its whole prompt when it starts, so that what has started can
    always be finished; it starts behind those that the prefix cache has. While the pool is too full
    for the head of the queue, nobody overtakes it.
    Chunks that are not the last end on a page boundary, so every chunk completes whole pages.
    """

    def __init__(self, cache: PrefixCache, layout: KVLayout, max_batch_tokens: int) -> None:
        if max_batch_tokens < layout.page_size:
            raise ValueError(
                f"max_batch_tokens is {max_batch_tokens}; it must be at least the page size "
                f"{layout.page_size}"
            )
        self._cache = cache
        self._layout = layout
        self._max_batch_tokens = max_batch_tokens
        self._queue: deque[PrefillSequence] = deque()

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

    def schedule(self) -> list[Chunk]:
        """Chunks of the next step. Allocates pages for those that start."""
        budget = self._max_batch_tokens
        chunks: list[Chunk] = []
        while self._queue and budget:
            sequence = self._queue[0]
            if not self._has_pages(sequence):
                break
            num_tokens = self._chunk_tokens(sequence, budget)
            if not num_tokens:
                break
            chunks.append(Chunk(sequence, num_tokens))
            budget -= num_tokens
            if num_tokens < sequence.num_remaining:
                break
            self._queue.popleft()
        return chunks

    def _chunk_tokens(self, sequence: PrefillSequence, budget: int) -> int:
        if sequence.num_remaining <= budget:
            return sequence.num_remaining
        return budget - budget % self._layout.page_size

    def _has_pages(self, sequence: PrefillSequence) -> bool:
        if sequence.pages:
            return True
        num_tokens = len(sequence.token_ids)
        reusable = sequence.page_keys[: (num_tokens - 1) // self._layout.page_size]
        allocated = self._cache.allocate(reusable, self._layout.num_pages(num_tokens))
        if allocated is None:
            return False
        sequence.pages = allocated.pages
        sequence.num_cached = allocated.num_hits * self._layout.page_size
        sequence.num_computed = sequence.num_cached
        return True
