"""The memory of a worker's KV cache: one byte pool that the model and the transfer code share."""

import torch
from torch import Tensor

from pagewire.kernels.kv_pool import KVPool
from pagewire.kv_transfer.layout import KVLayout


class KVCache:
    """A pool of pages in the layout of `KVLayout`.

    Who owns which page is not known here. The memory is not cleared, and on a CPU the system
    provides it only when a page is first written.
    """

    def __init__(self, layout: KVLayout, num_pages: int, device: str = "cpu") -> None:
        """Raises ValueError when `num_pages` is not positive."""
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; it must be at least 1")
        self.layout = layout
        self.num_pages = num_pages
        self.pool = torch.empty((num_pages, layout.page_bytes), dtype=torch.uint8, device=device)

    @property
    def pages(self) -> KVPool:
        """The pool as the model sees it."""
        return view_pages(self.pool, self.layout)

    def buffer(self) -> memoryview:
        """The pool as the transfer code sees it: writable bytes, page after page.

        Raises TypeError when the pool is not in host memory.
        """
        if self.pool.device.type != "cpu":
            raise TypeError(f"the KV pool is on {self.pool.device}; only host memory has a buffer")
        return self.pool.view(-1).numpy().data


def view_pages(data: Tensor, layout: KVLayout, *, num_layers: int | None = None) -> KVPool:
    """Pages as operations see them; with `num_layers` so many layers of each, packed.

    data: uint8 [num_pages, bytes of a page], contiguous. Raises ValueError as KVPool does.
    """
    return KVPool(
        data,
        getattr(torch, layout.dtype),
        num_layers=layout.num_layers if num_layers is None else num_layers,
        num_kv_heads=layout.num_kv_heads,
        page_size=layout.page_size,
        head_dim=layout.head_dim,
    )
