"""Gathers a part of many pages into one run of memory, as a frame carries it, and scatters it back.

Bytes are moved as they are, so the dtype of the KV cache does not matter.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor, empty, int32, int64, uint8

from pagewire.kernels.gpu.arguments import (
    require,
    require_contiguous,
    require_dtype,
    require_same_device,
    require_shape,
)
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=4)
WORD_BYTES = 8
BLOCK_WORDS = 2048  # 16 KiB of a program


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePart:
    """The same bytes of every page: in each layer of a range one run, of a range of KV heads.

    All layers of all heads are a single run of a single layer.
    """

    offset: int  # of the first run in a page
    num_layers: int
    layer_bytes: int  # from one layer to the next
    run_bytes: int

    @property
    def end(self) -> int:
        return self.offset + (self.num_layers - 1) * self.layer_bytes + self.run_bytes


@triton.jit
def _copy_kernel(
    pool_ptr: tl.tensor,  # int64 [num_pages, page_words]
    payload_ptr: tl.tensor,  # int64 [len(pages), num_layers, run_words]
    pages_ptr: tl.tensor,  # int32 [len(pages)]
    num_layers: tl.tensor,
    page_words: tl.tensor,
    offset: tl.tensor,  # the rest as in PagePart, in words
    layer_words: tl.tensor,
    run_words: tl.tensor,
    TO_POOL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    page = tl.load(pages_ptr + run // num_layers).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < run_words
    pool_at = pool_ptr + page * page_words + offset + run % num_layers * layer_words + word
    payload_at = payload_ptr + run * run_words + word
    if TO_POOL:
        tl.store(pool_at, tl.load(payload_at, mask=inside), mask=inside)
    else:
        tl.store(payload_at, tl.load(pool_at, mask=inside), mask=inside)


def gather_pages(pool: Tensor, pages: Tensor, part: PagePart) -> Tensor:
    """Copy `part` of some pages, in their order.

    pool: uint8 [num_pages, page_bytes]; pages: int32 [n], below num_pages. Returns uint8
    [n, num_layers, run_bytes]. Raises KernelArgumentError.
    """
    shape = (len(pages), part.num_layers, part.run_bytes)
    payload = empty(shape, dtype=uint8, device=pool.device)
    _launch(pool, pages, part, payload, to_pool=False)
    return payload


def scatter_pages(payload: Tensor, pool: Tensor, pages: Tensor, part: PagePart) -> None:
    """Put what `gather_pages` returned into pages, no two of them the same. Raises as it does."""
    _launch(pool, pages, part, payload, to_pool=True)


def _launch(pool: Tensor, pages: Tensor, part: PagePart, payload: Tensor, *, to_pool: bool) -> None:
    require_shape("pool", pool, (None, None))
    require_shape("pages", pages, (None,))
    require_shape("payload", payload, (len(pages), part.num_layers, part.run_bytes))
    require_dtype("pool", pool, uint8)
    require_dtype("payload", payload, uint8)
    require_dtype("pages", pages, int32)
    require_contiguous(pool=pool, pages=pages, payload=payload)
    require_same_device(pool=pool, pages=pages, payload=payload)
    page_bytes = pool.shape[1]
    sizes = {
        "page_bytes": page_bytes,
        "offset": part.offset,
        "layer_bytes": part.layer_bytes,
        "run_bytes": part.run_bytes,
    }
    for name, size in sizes.items():
        require(size % WORD_BYTES == 0, f"{name} is {size}; give a multiple of {WORD_BYTES}")
    require(
        part.offset >= 0 and part.end <= page_bytes,
        f"the part ends at byte {part.end}; a page has {page_bytes}",
    )
    run_words = part.run_bytes // WORD_BYTES
    _copy_kernel[(len(pages) * part.num_layers, triton.cdiv(run_words, BLOCK_WORDS))](
        pool.view(int64),
        payload.view(int64),
        pages,
        part.num_layers,
        page_bytes // WORD_BYTES,
        part.offset // WORD_BYTES,
        part.layer_bytes // WORD_BYTES,
        run_words,
        TO_POOL=to_pool,
        BLOCK=BLOCK_WORDS,
        num_warps=LAUNCH.num_warps,
    )


VARIANTS = tuple(
    Variant(
        name=name,
        kernel=_copy_kernel,
        arguments={
            "pool_ptr": "*i64:16",
            "payload_ptr": "*i64:16",
            "pages_ptr": "*i32:16",
            "num_layers": "i32",
            "page_words": "i32:16",
            "offset": "i32:16",
            "layer_words": "i32:16",
            "run_words": "i32:16",
        },
        constants={"TO_POOL": to_pool, "BLOCK": BLOCK_WORDS},
        launch=LAUNCH,
    )
    for name, to_pool in (("gather_pages", False), ("scatter_pages", True))
)
