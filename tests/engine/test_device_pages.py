"""Pages of a device to host memory and back: what is copied, and never before its time.

The device is the CPU, and makes its copies when a test says so.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from held_copies import HeldCopies

from pagewire.engine.device_pages import DevicePages
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_scatter import KVScatter
from pagewire.kv_transfer.layout import FrameRange, KVLayout, byte_runs

LAYOUT = KVLayout(page_size=32, num_layers=4, num_kv_heads=2, head_dim=8, dtype="float32")
NUM_PAGES = 9
PART = FrameRange(first_page=1, num_pages=2, first_layer=1, num_layers=2)
TABLE = (7, 2, 3, 5)  # the part's pages are neighbours here, whose layers are not


def cache_of(layout: KVLayout, seed: int | None = None) -> KVCache:
    """Pages of small whole numbers, so that any dtype holds them; of zeros without a seed."""
    cache = KVCache(layout, NUM_PAGES)
    cache.pool.zero_()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(-9, 10, cache.pages.values.shape, generator=generator)
        cache.pages.values.copy_(values)
        if cache.pages.scales is not None:
            cache.pages.scales.fill_(1)
    return cache


def payload_of(cache: KVCache, part: FrameRange) -> bytes:
    buffer = cache.buffer()
    return b"".join(
        buffer[offset : offset + length] for offset, length in byte_runs(cache.layout, part, TABLE)
    )


@pytest.mark.parametrize(
    "part",
    [
        PART,
        FrameRange(first_page=0, num_pages=4, first_layer=0, num_layers=4),
        FrameRange(first_page=3, num_pages=1, first_layer=3, num_layers=1),
    ],
)
def test_gather_is_the_payload_of_a_frame(part: FrameRange) -> None:
    cache = cache_of(LAYOUT, seed=1)
    into = torch.zeros(part.num_bytes(LAYOUT), dtype=torch.uint8)
    DevicePages(cache, HeldCopies(is_free=True)).gather(part, TABLE, into).wait()
    assert into.numpy().tobytes() == payload_of(cache, part)


def test_gather_waits_for_what_computes_the_pages() -> None:
    cache = cache_of(LAYOUT)
    copies = HeldCopies()
    computed = copies.mark()
    into = torch.zeros(PART.num_bytes(LAYOUT), dtype=torch.uint8)
    copied = DevicePages(cache, copies).gather(PART, TABLE, into, after=computed)
    with pytest.raises(AssertionError, match="before what it waits for"):
        copies.release()

    cache.pool.fill_(7)
    computed.come()
    copied = DevicePages(cache, copies).gather(PART, TABLE, into, after=computed)
    assert not into.any()
    copies.release()
    copied.wait()
    assert into.eq(7).all()


@pytest.mark.parametrize(
    "target",
    [
        replace(LAYOUT, page_size=size, dtype=dtype)
        for size, dtype in product((16, 32, 64), ("float32", "bfloat16", "int8"))
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_write_is_that_of_host_memory(target: KVLayout, dtype: str) -> None:
    source = replace(LAYOUT, dtype=dtype)
    payload = np.frombuffer(bytearray(payload_of(cache_of(source, seed=2), PART)), dtype=np.uint8)
    expected, cache = cache_of(target), cache_of(target)
    table = tuple(range(NUM_PAGES - 1, 2, -1))
    KVScatter(expected).write(payload, PART, source, table)
    DevicePages(cache, HeldCopies(is_free=True)).write(payload, PART, source, table)
    assert expected.pool.any()
    assert torch.equal(cache.pool, expected.pool)


def test_write_returns_when_the_copy_has_ended() -> None:
    cache, copies = cache_of(LAYOUT), HeldCopies()
    payload = np.ones(PART.num_bytes(LAYOUT), dtype=np.uint8)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(DevicePages(cache, copies).write, payload, PART, LAYOUT, TABLE)
        copies.await_held(1)
        assert not writing.done()
        assert not cache.pool.any()
        copies.release()
        writing.result(timeout=60)
    assert cache.pool.sum() == len(payload)
