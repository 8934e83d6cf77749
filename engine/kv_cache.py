"""The memory of a worker's KV cache: one byte pool that the model and the transfer code share."""

import contextlib
import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

from pagewire.engine.batch import PageCopy
from pagewire.engine.errors import DeviceMemoryError
from pagewire.kernels.kv_pool import KVPool
from pagewire.kv_transfer.layout import KVLayout


class KVCache:
    """A pool of pages in the layout of `KVLayout`.

    Who owns which page is not known here. The memory holds anything, and on a CPU the system
    provides it only where a page is first written.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        device: str = "cpu",
        memory: Tensor | None = None,
    ) -> None:
        """`memory`: uint8 [bytes of all pages]; None: the cache takes some for itself.

        Raises ValueError when `num_pages` is not positive.
        """
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; it must be at least 1")
        self.layout = layout
        self.num_pages = num_pages
        if memory is None:
            memory = _new_memory(num_pages * layout.page_bytes, device)
        self.pool = memory.view(num_pages, layout.page_bytes)

    @property
    def pages(self) -> KVPool:
        """The pool as the model sees it."""
        return view_pages(self.pool, self.layout)

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        """Make copies of whole pages, one after another."""
        for source, destination in copies:
            self.pool[destination].copy_(self.pool[source])

    def buffer(self) -> memoryview:
        """The pool as transports see it: writable bytes, page after page.

        Raises DeviceMemoryError when the pool is not in host memory.
        """
        if self.pool.device.type != "cpu":
            raise DeviceMemoryError(
                f"the KV cache is on {self.pool.device}, where the host cannot read it; copy its "
                "pages, as DevicePages does"
            )
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


def _new_memory(num_bytes: int, device: str) -> Tensor:
    """uint8 [num_bytes]."""
    if torch.device(device).type != "cpu":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return in_huge_pages(memory)


def in_huge_pages(memory: mmap.mmap) -> Tensor:
    """`memory` as uint8 [num_bytes], in huge pages where the system has them.

    Attention reads pages in any order; with 4 KiB of memory behind each entry of the TLB it would
    wait for address translation.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # a kernel that was built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
