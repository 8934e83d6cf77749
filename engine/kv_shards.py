"""The KV cache of a worker as frames see it: all KV heads, though each rank has only its own.

Frames are laid out as if there was one pool with all heads. So nobody outside of a worker knows how
many ranks it has, and workers with different numbers of them exchange pages.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_scatter import KVScatter
from pagewire.kv_transfer.layout import FrameRange, KVLayout
from pagewire.kv_transfer.reshard import HeadSplit

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shard:
    """Neighbouring KV heads, in the pool of a rank that has them."""

    layout: KVLayout
    pool: Bytes


class KVShards:
    """The pools of all ranks of a worker, with pages of the same numbers, in host memory."""

    def __init__(self, layout: KVLayout, caches: tuple[KVCache, ...]) -> None:
        """`layout` has all KV heads; `caches`: by rank, each with the heads of its rank.

        Raises LayoutError when so many ranks cannot have these heads, TypeError when a cache is not
        in host memory.
        """
        self._layout = layout
        split = HeadSplit(num_kv_heads=layout.num_kv_heads, degree=len(caches))
        self._shards = [
            _Shard(layout=cache.layout, pool=np.frombuffer(cache.buffer(), np.uint8))
            for cache in caches[:: split.num_replicas]
        ]
        self._scatters = [
            KVScatter(cache, heads=split.heads(rank)) for rank, cache in enumerate(caches)
        ]

    def runs(self, part: FrameRange, page_table: tuple[int, ...]) -> Iterator[memoryview]:
        """What a frame consists of, in the order of its payload: of each layer, shard by shard.

        `page_table` maps the sequence's page indices to pages of the pools.
        """
        for index in range(part.first_page, part.first_page + part.num_pages):
            page = page_table[index]
            for layer in range(part.first_layer, part.first_layer + part.num_layers):
                for shard in self._shards:
                    length = shard.layout.layer_bytes
                    start = page * shard.layout.page_bytes + layer * length
                    yield shard.pool[start : start + length].data

    def write(
        self, payload: Bytes, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        """Put `payload`, which is `part` in the layout `source`, into the pages of every rank.

        The layouts must hold the same KV. Slots that the page table does not reach are left out.
        """
        for scatter in self._scatters:
            scatter.write(payload, part, source, page_table)
