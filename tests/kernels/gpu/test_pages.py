"""Pages that are gathered, scattered and brought into other sizes, to the byte."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pagewire.engine.kv_cache import KVCache, view_pages
from pagewire.engine.kv_scatter import KVScatter
from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.pages import PagePart, gather_pages, scatter_pages
from pagewire.kernels.gpu.retile import retile_pages
from pagewire.kernels.kv_pool import KVPool
from pagewire.kv_transfer.layout import FrameRange, KVLayout

NUM_LAYERS = 2
PART = PagePart(offset=16, num_layers=2, layer_bytes=128, run_bytes=40)


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def ids(*pages: int) -> Tensor:
    return torch.tensor(pages, dtype=torch.int32)


def test_a_part_of_pages_is_gathered_in_their_order() -> None:
    pool = random_bytes(5, 256)
    payload = gather_pages(pool, ids(4, 0, 4), PART)
    assert torch.equal(payload, pool.view(5, 2, 128)[[4, 0, 4], :, 16:56])


def test_a_part_of_pages_is_scattered() -> None:
    pool, payload = random_bytes(5, 256), random_bytes(2, 2, 40)
    expected = pool.clone()
    expected.view(5, 2, 128)[[3, 1], :, 16:56] = payload
    scatter_pages(payload, pool, ids(3, 1), PART)
    assert torch.equal(pool, expected)


def test_whole_pages_of_several_tiles() -> None:
    pool = random_bytes(3, 40_000)
    whole = PagePart(offset=0, num_layers=1, layer_bytes=40_000, run_bytes=40_000)
    assert torch.equal(gather_pages(pool, ids(2, 1), whole)[:, 0], pool[[2, 1]])


def test_parts_that_do_not_fit_are_refused() -> None:
    pool = random_bytes(5, 192)
    with pytest.raises(KernelArgumentError, match="ends at byte 184; a page has 176"):
        gather_pages(pool[:, :176].contiguous(), ids(0), PART)
    odd = PagePart(offset=4, num_layers=1, layer_bytes=8, run_bytes=8)
    with pytest.raises(KernelArgumentError, match="offset is 4; give a multiple of 8"):
        gather_pages(pool, ids(0), odd)
    with pytest.raises(KernelArgumentError, match=r"pages is torch\.int64; give torch\.int32"):
        gather_pages(pool, ids(0).long(), PART)


def layout(page_size: int, num_kv_heads: int, dtype: str) -> KVLayout:
    return KVLayout(
        page_size=page_size,
        num_layers=NUM_LAYERS,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        dtype=dtype,
    )


@settings(max_examples=10)
@given(
    source_page=st.sampled_from([16, 32]),
    target_page=st.sampled_from([16, 32]),
    dtype=st.sampled_from(["bfloat16", "int8"]),
    first_page=st.integers(0, 1),
    num_pages=st.integers(1, 2),
    reach=st.integers(1, 5),
)
def test_pages_of_another_size_hold_what_the_scatter_of_the_cpu_writes(
    source_page: int, target_page: int, dtype: str, first_page: int, num_pages: int, reach: int
) -> None:
    # Between pages of one size nobody sends more than the receiver has pages for.
    assume(source_page != target_page or reach >= first_page + num_pages)
    source, target = layout(source_page, 2, dtype), layout(target_page, 2, dtype)
    payload = random_bytes(num_pages, source.page_bytes)
    cache = KVCache(target, 6)
    table = (5, 2, 4, 0, 3)[:reach]
    part = FrameRange(
        first_page=first_page, num_pages=num_pages, first_layer=0, num_layers=NUM_LAYERS
    )
    KVScatter(cache).write(payload.view(-1).numpy(), part, source, table)

    data = torch.zeros(6, target.page_bytes, dtype=torch.uint8)
    retile_pages(
        view_pages(payload, source),
        view_pages(data, target),
        ids(*table),
        first_token=first_page * source_page,
        first_layer=0,
        first_head=0,
    )

    assert torch.equal(data, cache.pool)


def test_layers_and_heads_go_where_they_belong() -> None:
    source = KVLayout(page_size=32, num_layers=1, num_kv_heads=2, head_dim=8, dtype="int8")
    wide = layout(16, 4, "int8")
    target = view_pages(torch.zeros(2, wide.page_bytes, dtype=torch.uint8), wide)
    brought = view_pages(random_bytes(1, source.page_bytes), source)
    assert brought.scales is not None and target.scales is not None

    retile_pages(brought, target, ids(1, 0), first_token=0, first_layer=1, first_head=2)

    for page, first in ((1, 0), (0, 16)):
        slots = slice(first, first + 16)
        assert torch.equal(target.values[page, 1, 2:], brought.values[0, 0, :, :, slots])
        bits = brought.scales.view(torch.int32)[0, 0, :, :, slots]
        assert torch.equal(target.scales.view(torch.int32)[page, 1, 2:], bits)
    assert not target.values[:, 0].any() and not target.values[:, 1, :2].any()


def test_pools_that_do_not_fit_are_refused() -> None:
    small, wide = layout(16, 2, "bfloat16"), layout(32, 3, "bfloat16")
    source = view_pages(random_bytes(2, small.page_bytes), small)
    target = view_pages(random_bytes(2, wide.page_bytes), wide)
    quantized = layout(32, 3, "int8")

    def refused(problem: str, into: KVPool = target, **options: int) -> None:
        places = {"first_token": 0, "first_layer": 0, "first_head": 0} | options
        with pytest.raises(KernelArgumentError, match=problem):
            retile_pages(source, into, ids(0), **places)

    refused("first_token is 8; give a multiple", first_token=8)
    refused("layers 1 to 3 of 2", first_layer=1)
    refused("KV heads 2 to 4 of 3", first_head=2)
    refused(r"the target torch\.int8", view_pages(random_bytes(1, quantized.page_bytes), quantized))
