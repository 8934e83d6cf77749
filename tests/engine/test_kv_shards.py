"""Frames between workers of unequal numbers of ranks: every head arrives on whoever has it."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_scatter import KVScatter
from pagewire.engine.kv_shards import KVShards
from pagewire.kv_transfer.layout import FrameRange, KVLayout, LayoutError, byte_runs
from pagewire.kv_transfer.reshard import HeadSplit

NUM_KV_HEADS = 4
NUM_PAGES = 6
NUM_TOKENS = 60
PAGE_TABLE = (4, 1, 3, 0)
PARTS = [
    FrameRange(first_page=0, num_pages=2, first_layer=0, num_layers=3),
    FrameRange(first_page=2, num_pages=1, first_layer=0, num_layers=1),
    FrameRange(first_page=2, num_pages=1, first_layer=1, num_layers=2),
    FrameRange(first_page=3, num_pages=1, first_layer=0, num_layers=3),
]
DTYPES = [("float32", "float32"), ("int8", "int8"), ("bfloat16", "float32"), ("float32", "int8")]


def whole_layout(dtype: str, page_size: int = 16) -> KVLayout:
    return KVLayout(
        page_size=page_size, num_layers=3, num_kv_heads=NUM_KV_HEADS, head_dim=8, dtype=dtype
    )


def filled(layout: KVLayout) -> KVCache:
    """A cache with all heads, full of numbers."""
    cache = KVCache(layout, NUM_PAGES)
    torch.manual_seed(0)
    pages = cache.pages
    pages.values.copy_(torch.randn(pages.values.shape) * 40)
    if pages.scales is not None:
        pages.scales.copy_(torch.rand(pages.scales.shape))
    return cache


def split(whole: KVCache, degree: int) -> tuple[KVCache, ...]:
    """The same pages on several ranks, with the heads of each."""
    return tuple(
        _heads_of(whole, HeadSplit(num_kv_heads=NUM_KV_HEADS, degree=degree).heads(rank))
        for rank in range(degree)
    )


def _heads_of(whole: KVCache, heads: range) -> KVCache:
    cache = KVCache(replace(whole.layout, num_kv_heads=len(heads)), whole.num_pages)
    segments = whole.pool.view(NUM_PAGES, whole.layout.num_layers, NUM_KV_HEADS, -1)
    cache.pool.copy_(segments[:, :, heads.start : heads.stop].reshape(cache.pool.shape))
    return cache


def empty(layout: KVLayout, num_pages: int = NUM_PAGES) -> KVCache:
    cache = KVCache(layout, num_pages)
    cache.pool.zero_()
    return cache


def payload_of(cache: KVCache, part: FrameRange) -> bytes:
    buffer = cache.buffer()
    runs = byte_runs(cache.layout, part, PAGE_TABLE)
    return b"".join(bytes(buffer[offset : offset + length]) for offset, length in runs)


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_frame_has_the_bytes_that_one_rank_would_send(degree: int, dtype: str) -> None:
    whole = filled(whole_layout(dtype))
    shards = KVShards(whole.layout, split(whole, degree))
    for part in PARTS:
        assert b"".join(shards.runs(part, PAGE_TABLE)) == payload_of(whole, part)


@pytest.mark.parametrize(
    ("degree", "page_size", "dtypes"),
    list(product([1, 2, 4, 8], [16, 32], DTYPES)),
)
def test_every_rank_gets_its_heads_of_a_frame(
    degree: int, page_size: int, dtypes: tuple[str, str]
) -> None:
    sender, layout = filled(whole_layout(dtypes[0])), whole_layout(dtypes[1], page_size)
    expected = empty(layout)
    table = PAGE_TABLE[: layout.num_pages(NUM_TOKENS)]
    ranks = split(empty(layout), degree)
    shards = KVShards(layout, ranks)
    for part in PARTS:
        payload = np.frombuffer(bytearray(payload_of(sender, part)), np.uint8)
        KVScatter(expected).write(payload, part, sender.layout, table)
        shards.write(payload, part, sender.layout, table)
    for found, wanted in zip(ranks, split(expected, degree), strict=True):
        assert torch.equal(found.pool, wanted.pool)


def test_heads_that_cannot_be_split_evenly_are_refused() -> None:
    layout = whole_layout("float32")
    with pytest.raises(LayoutError, match="degree is 3, num_kv_heads 4"):
        KVShards(layout, tuple(empty(layout) for _ in range(3)))
