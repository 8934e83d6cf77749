"""Payloads into a KV cache: the model reads there what the sender had, in the receiver's dtype."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_scatter import KVScatter
from pagewire.kernels.kv_pool import quantize_vectors
from pagewire.kv_transfer.layout import (
    DTYPE_BYTES,
    PAGE_SIZES,
    SCALE_BYTES,
    KVLayout,
    byte_runs,
    plan_frames,
)

NUM_TOKENS = 150
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 3, 8

DTYPE_PAIRS = list(product(sorted(DTYPE_BYTES), repeat=2))
SIZE_PAIRS = list(product(PAGE_SIZES, repeat=2))


def make_cache(page_size: int, dtype: str) -> KVCache:
    layout = KVLayout(
        page_size=page_size,
        num_layers=NUM_LAYERS,
        num_kv_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
    )
    cache = KVCache(layout, layout.num_pages(NUM_TOKENS) + 1)
    cache.pool.zero_()
    return cache


def page_table(cache: KVCache) -> tuple[int, ...]:
    """All pages but the first, in reverse."""
    return tuple(range(cache.num_pages - 1, 0, -1))


def store_at(cache: KVCache, position: int, vectors: Tensor) -> None:
    """vectors: float32 [NUM_LAYERS, NUM_HEADS, 2, HEAD_DIM], of one token."""
    index, slot = divmod(position, cache.layout.page_size)
    pages = cache.pages
    if pages.scales is None:
        pages.values[page_table(cache)[index], :, :, :, slot] = vectors.to(pages.values.dtype)
        return
    values, scales = quantize_vectors(vectors, pages.values.dtype)
    pages.values[page_table(cache)[index], :, :, :, slot] = values
    pages.scales[page_table(cache)[index], :, :, :, slot] = scales


def load_at(cache: KVCache, position: int) -> Tensor:
    """float32 [NUM_LAYERS, NUM_HEADS, 2, HEAD_DIM]: what attention reads of one token."""
    index, slot = divmod(position, cache.layout.page_size)
    pages = cache.pages
    values = pages.values[page_table(cache)[index], :, :, :, slot].float()
    if pages.scales is None:
        return values
    return values * pages.scales[page_table(cache)[index], :, :, :, slot, None]


def hand_over(sender: KVCache, receiver: KVCache, slot_bytes: int) -> None:
    pool = np.frombuffer(sender.buffer(), dtype=np.uint8)
    scatter = KVScatter(receiver)
    for part in plan_frames(sender.layout, 0, sender.layout.num_pages(NUM_TOKENS), slot_bytes):
        runs = byte_runs(sender.layout, part, page_table(sender))
        payload = np.concatenate([pool[offset : offset + length] for offset, length in runs])
        scatter.write(payload, part, sender.layout, page_table(receiver))


@pytest.fixture(scope="module")
def vectors() -> Tensor:
    """float32 [NUM_TOKENS, NUM_LAYERS, NUM_HEADS, 2, HEAD_DIM], of magnitudes 1e-3 to 1e3."""
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_TOKENS, NUM_LAYERS, NUM_HEADS, 2, HEAD_DIM)
    magnitudes = 10 ** (6 * torch.rand(shape[:-1], generator=generator) - 3)
    vectors = torch.randn(shape, generator=generator) * magnitudes[..., None]
    vectors[3, 1, 2, 0] = 0  # whose scale is 1
    return vectors


def check_handed_over(sender: KVCache, receiver: KVCache) -> None:
    """Every token is there as if it had been stored from what the sender had; no more is there."""
    expected = make_cache(receiver.layout.page_size, receiver.layout.dtype)
    for position in range(NUM_TOKENS):
        store_at(expected, position, load_at(sender, position))
    quantized = receiver.layout.dtype in SCALE_BYTES
    if quantized and sender.layout.dtype == receiver.layout.dtype:
        for position in range(NUM_TOKENS):
            assert torch.equal(load_at(receiver, position), load_at(sender, position))
    elif quantized:
        for position in range(NUM_TOKENS):
            assert torch.equal(load_at(receiver, position), load_at(expected, position))
    else:
        assert torch.equal(receiver.pool, expected.pool)
    assert not receiver.pool[0].any()


@pytest.mark.parametrize(("mine", "theirs"), DTYPE_PAIRS)
def test_every_pair_of_dtypes(mine: str, theirs: str, vectors: Tensor) -> None:
    sender, receiver = make_cache(32, mine), make_cache(32, theirs)
    for position in range(NUM_TOKENS):
        store_at(sender, position, vectors[position])
    hand_over(sender, receiver, sender.layout.page_bytes * 2)
    check_handed_over(sender, receiver)


@pytest.mark.parametrize(("mine", "theirs"), SIZE_PAIRS)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "int8"), ("int8",) * 2])
def test_every_pair_of_page_sizes(
    mine: int, theirs: int, dtypes: tuple[str, str], vectors: Tensor
) -> None:
    sender, receiver = make_cache(mine, dtypes[0]), make_cache(theirs, dtypes[1])
    for position in range(NUM_TOKENS):
        store_at(sender, position, vectors[position])
    hand_over(sender, receiver, sender.layout.layer_bytes)
    check_handed_over(sender, receiver)


def test_equal_dtypes_keep_their_bytes() -> None:
    """Even those that are no numbers."""
    sender, receiver = make_cache(64, "float32"), make_cache(64, "float32")
    sender.pool.fill_(0xFF)
    hand_over(sender, receiver, sender.layout.page_bytes)
    assert torch.equal(receiver.pool[1:], sender.pool[1:])
