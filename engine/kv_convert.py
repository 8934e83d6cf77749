"""Payloads of frames into pages of another dtype, as the operations of a model store K and V.

Tensors are read and written where they are, in the memory of the host or of a device.
"""

from torch import Tensor

from pagewire.engine.kv_cache import view_pages
from pagewire.kernels.kv_pool import KVPool, quantize_vectors
from pagewire.kv_transfer.layout import FrameRange, KVLayout
from pagewire.kv_transfer.retile import slot_runs

Index = tuple[int | slice, ...]


class KVConversion:
    """Writes into one KV cache."""

    def __init__(self, pages: KVPool, layout: KVLayout, heads: range | None = None) -> None:
        """`layout` is that of `pages`; `heads`: those of a payload that they have, None for all."""
        self._pages = pages
        self._layout = layout
        self._heads = slice(heads.start, heads.stop) if heads else slice(None)

    def write(
        self, payload: Tensor, part: FrameRange, source: KVLayout, page_table: tuple[int, ...]
    ) -> None:
        """Convert `payload`, which is `part` in the layout `source`, into the pages of a sequence.

        payload: uint8 [bytes], where the pages are. Slots that the page table does not reach are
        left out.
        """
        data = payload.view(part.num_pages, -1)
        incoming = view_pages(data, source, num_layers=part.num_layers)
        layers = slice(part.first_layer, part.first_layer + part.num_layers)
        everything = slice(None)
        for run in slot_runs(part, source, self._layout, page_table):
            source_slots = slice(run.source_slot, run.source_slot + run.num_slots)
            slots = slice(run.slot, run.slot + run.num_slots)
            vectors = _load(
                incoming, (run.source_page, everything, self._heads, everything, source_slots)
            )
            self._store(vectors, (run.page, layers, everything, everything, slots))

    def _store(self, vectors: Tensor, at: Index) -> None:
        """vectors: as `_load` returns them."""
        if self._pages.scales is None:
            self._pages.values[at] = vectors
            return
        self._pages.values[at], self._pages.scales[at] = quantize_vectors(
            vectors.float(), self._pages.values.dtype
        )


def _load(pool: KVPool, at: Index) -> Tensor:
    """Floats [num_layers, num_kv_heads, 2 (K, V), num_slots, head_dim]."""
    values = pool.values[at]
    return values if pool.scales is None else values.float().mul_(pool.scales[at][..., None])
