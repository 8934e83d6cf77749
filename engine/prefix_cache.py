"""Finds pages whose KV was computed before: chained hashes of full pages, kept until needed. Pure.

Only full pages are shared, and nothing writes a full page again, so sharing needs no copy. A hit is
verified by its token ids, not by its hash alone. Eviction takes leaves first, by age and by the
cost to compute a page again, and only when the pool has no free page left.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pagewire.engine.page_pool import IntegrityError, PagePool, PageState, Reservation
from pagewire.proto.page_hash import PageKey

# Where attention costs as much as the rest of the layers: 3,000 tokens for a model of 135 million
# parameters, 26,000 for one of 8 billion. It only weighs age against depth.
_PARITY_PAGES = 64


class AllocatedPages(NamedTuple):
    """Pages of one sequence, in order; the first `num_hits` hold their KV already."""

    pages: tuple[int, ...]
    num_hits: int


class ReservedPages(NamedTuple):
    """Leading pages of one sequence that hold their KV already, and a promise of the rest."""

    hits: tuple[int, ...]
    reservation: Reservation


class CacheChanges(NamedTuple):
    """Hashes that came to be cached, and that ceased to be."""

    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]


@dataclass(slots=True, eq=False)
class _Node:
    """A cached page. The nodes form a forest: a path from a root is a prefix."""

    key: PageKey
    page: int
    generation: int  # of the page, when it was cached
    depth: int  # pages before it
    parent: "_Node | None"
    num_children: int = 0
    priority: float = 0.0  # the lowest is evicted first


class PrefixCache:
    """Full pages by the hash of the prefix that they end.

    Age counts in pages used since. A page that costs c times as much to compute again as the first
    page of a prompt is kept through c - 1 more turnovers of the pool (compare GreedyDual, Cao and
    Irani 1997): the cost grows linearly with depth, as attention does.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        pool.set_evictor(self.evict)
        self._nodes: dict[bytes, _Node] = {}
        self._leaves: list[tuple[float, int, _Node]] = []  # a heap; may hold outdated entries
        self._num_entries = 0  # entries ever made: no two compare equal
        self._num_uses = 0  # the clock that age is counted by
        self._stored: dict[bytes, None] = {}  # since the last take_changes, in order
        self._removed: dict[bytes, None] = {}

    def __len__(self) -> int:
        """Cached pages, used or not."""
        return len(self._nodes)

    def lookup(self, keys: Sequence[PageKey]) -> tuple[int, ...]:
        """The pages of the longest cached prefix of `keys`."""
        return tuple(node.page for node in self._path(keys))

    def allocate(self, keys: Sequence[PageKey], num_pages: int) -> AllocatedPages | None:
        """`num_pages` pages for a sequence that starts with `keys`; None while there is no room.

        The caller becomes an owner of every page. It may write those after the hits only.
        """
        hits = self.lookup(keys)
        if not self._has_room(hits, num_pages):
            return None
        self._use(keys, hits)
        return AllocatedPages(hits + self._pool.allocate(num_pages - len(hits)), len(hits))

    def reserve(
        self, keys: Sequence[PageKey], num_pages: int, *, unit: int = 1
    ) -> ReservedPages | None:
        """As `allocate`, with a promise instead of the pages that are not cached.

        Hits are used in whole units of `unit` pages.
        """
        hits = self.lookup(keys)
        hits = hits[: len(hits) // unit * unit]
        if not self._has_room(hits, num_pages):
            return None
        self._use(keys[: len(hits)], hits)
        return ReservedPages(hits, self._pool.reserve(num_pages - len(hits)))

    def register(self, keys: Sequence[PageKey], pages: Sequence[int]) -> None:
        """The KV of `keys` lies in `pages`, complete; the caller owns these.

        Where a prefix is cached in another page already, that one is kept.
        """
        parent: _Node | None = None
        for depth, (key, page) in enumerate(zip(keys, pages, strict=True)):
            node = self._nodes.get(key.hash)
            if node is None:
                node = self._insert(key, page, depth, parent)
            elif node.key != key:  # two prefixes with one hash: the older stays
                break
            self._touch(node)
            parent = node
        self._push(parent)

    def evict(self, num_pages: int) -> None:
        """Free `num_pages` cached pages that nobody uses."""
        used: list[_Node] = []
        while num_pages:
            node = self._pop_leaf()
            if node is None:  # what is left to free lies before pages in use: forget one of these
                if not used:
                    raise IntegrityError(
                        f"{num_pages} more pages were to be evicted than are cached"
                    )
                self._remove(used.pop(0))
            elif self._pool.state(node.page) is PageState.CACHED:
                self._remove(node)
                num_pages -= 1
            else:
                used.append(node)
        for node in used:
            self._push(node)

    def hashes(self) -> tuple[bytes, ...]:
        """All that is cached, parents before children."""
        return tuple(self._nodes)

    def take_changes(self) -> CacheChanges:
        """What has changed since the last call, without what has changed back."""
        changes = CacheChanges(tuple(self._stored), tuple(self._removed))
        self._stored.clear()
        self._removed.clear()
        return changes

    def check_integrity(self) -> None:
        """Raise IntegrityError unless cache and pool agree. Looks at every page."""
        num_marked = sum(map(self._pool.is_cached, range(self._pool.num_pages)))
        if num_marked != len(self._nodes):
            raise IntegrityError(f"{num_marked} pages are marked, {len(self._nodes)} are cached")
        num_children = Counter(node.key.parent for node in self._nodes.values())
        for node in self._nodes.values():
            if not self._pool.is_cached(node.page):
                raise IntegrityError(f"page {node.page} is cached without its mark")
            if node.generation != self._pool.generation(node.page):
                raise IntegrityError(f"page {node.page} was freed while it was cached")
            if node.parent is not None and self._nodes.get(node.key.parent) is not node.parent:
                raise IntegrityError(f"page {node.page} outlived the page before it")
            if node.num_children != num_children[node.key.hash]:
                raise IntegrityError(f"page {node.page} has lost count of those after it")

    def _path(self, keys: Sequence[PageKey]) -> list[_Node]:
        path: list[_Node] = []
        for key in keys:
            node = self._nodes.get(key.hash)
            if node is None or node.key != key:
                break
            path.append(node)
        return path

    def _has_room(self, hits: Sequence[int], num_pages: int) -> bool:
        return num_pages - len(hits) + self._pool.num_idle(hits) <= self._pool.num_available

    def _use(self, keys: Sequence[PageKey], hits: Sequence[int]) -> None:
        self._pool.retain(hits)
        path = self._path(keys)
        for node in path:
            self._touch(node)
        self._push(path[-1] if path else None)

    def _insert(self, key: PageKey, page: int, depth: int, parent: _Node | None) -> _Node:
        self._pool.cache(page)
        node = _Node(key, page, self._pool.generation(page), depth, parent)
        self._nodes[key.hash] = node
        if parent is not None:
            parent.num_children += 1
        _note(key.hash, self._stored, self._removed)
        return node

    def _remove(self, node: _Node) -> None:
        del self._nodes[node.key.hash]
        self._pool.uncache(node.page)
        _note(node.key.hash, self._removed, self._stored)
        if node.parent is not None:
            node.parent.num_children -= 1
            self._push(node.parent)

    def _touch(self, node: _Node) -> None:
        self._num_uses += 1
        node.priority = self._num_uses + self._pool.num_pages * node.depth / _PARITY_PAGES

    def _push(self, node: _Node | None) -> None:
        """Let a node be evicted, if it is a leaf."""
        if node is None or node.num_children:
            return
        if len(self._leaves) > 2 * len(self._nodes):
            self._leaves = [entry for entry in self._leaves if self._is_current(entry)]
            heapq.heapify(self._leaves)
        self._num_entries += 1
        heapq.heappush(self._leaves, (node.priority, self._num_entries, node))

    def _pop_leaf(self) -> _Node | None:
        """The leaf to evict first, out of the heap."""
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            if self._is_current(entry):
                return entry[-1]
        return None

    def _is_current(self, entry: tuple[float, int, _Node]) -> bool:
        priority, _, node = entry
        return (
            not node.num_children
            and node.priority == priority
            and self._nodes.get(node.key.hash) is node
        )


def _note(hash: bytes, changes: dict[bytes, None], opposite: dict[bytes, None]) -> None:
    """Add a change, or take its opposite back."""
    if hash in opposite:
        del opposite[hash]
    else:
        changes[hash] = None
