"""What is particular to attention in C++: edges of tiles and parts, and exact repeatability."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import PagedCase, Shape, assert_close
from torch import Tensor

from pagewire.kernels.native_attention import MAX_SPLIT_TOKENS, PART_LEN, TILE_ROWS
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.ops import Ops

GEOMETRIES = ((16, 64), (32, 80), (64, 20), (128, 128))  # (page_size, head_dim)


@pytest.fixture(scope="session")
def native(ops: Ops) -> NativeOps:
    if not isinstance(ops, NativeOps):
        pytest.skip("not C++")
    return ops


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("page_size", "head_dim"), GEOMETRIES)
@pytest.mark.parametrize("quantized", [False, True])
def test_contexts_around_a_page(
    native: NativeOps, quantized: bool, page_size: int, head_dim: int, dtype: torch.dtype
) -> None:
    contexts = (1, page_size - 1, page_size, page_size + 1)
    rows = [(1, context) for context in contexts] + [(context, context) for context in contexts[:2]]
    shape = Shape(rows=(*rows, (7, page_size + 1)), page_size=page_size, head_dim=head_dim)
    case = PagedCase(shape, dtype, quantized=quantized)
    assert_close(case.attention(native, None), case.expected(None))


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
def test_any_group(native: NativeOps, group: int, window: int | None) -> None:
    rows = ((1, 70), (2, 70), (MAX_SPLIT_TOKENS, 70), (MAX_SPLIT_TOKENS + 1, 70))
    case = PagedCase(Shape(rows=rows, group=group, num_kv_heads=1, head_dim=32), torch.float32)
    assert_close(case.attention(native, window), case.expected(window))


@pytest.mark.parametrize("window", [None, 40, PART_LEN, PART_LEN + 40])
@pytest.mark.parametrize("quantized", [False, True])
def test_contexts_of_several_parts(native: NativeOps, quantized: bool, window: int | None) -> None:
    end = 2 * PART_LEN
    rows = ((1, PART_LEN), (1, PART_LEN + 1), (1, end + 5), (MAX_SPLIT_TOKENS, end + 2))
    shape = Shape(rows=rows, page_size=128, num_kv_heads=1, group=2, num_layers=2)
    case = PagedCase(shape, torch.float32, quantized=quantized)
    assert_close(case.attention(native, window), case.expected(window))


def test_chunks_of_several_tiles(native: NativeOps) -> None:
    tile = TILE_ROWS // 8
    rows = ((tile, tile), (tile + 1, tile + 40), (3 * tile - 1, 3 * tile - 1))
    case = PagedCase(Shape(rows=rows, group=8, num_kv_heads=1), torch.float32)
    for window in (None, 1, 25):
        assert_close(case.attention(native, window), case.expected(window))


@settings(max_examples=15, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 10), max_size=4),
    window=st.none() | st.integers(1, 150),
    quantized=st.booleans(),
)
def test_a_prompt_has_the_same_bits_however_it_is_chunked(
    native: NativeOps, cuts: set[int], window: int | None, quantized: bool
) -> None:
    length = 200
    shape = Shape(rows=((length, length),), num_kv_heads=1)
    case = PagedCase(shape, torch.float32, quantized=quantized)
    whole = case.attention(native, window)
    bounds = [0, *sorted(cut * 18 for cut in cuts), length]
    for start, end in pairwise(bounds):
        batch = replace(
            case.batch,
            cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
        )
        plan = native.plan_attention(batch, scale=0.3, window=window)
        assert torch.equal(plan.run(case.q[start:end], case.pool, 1), whole[start:end])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("quantized", [False, True])
def test_a_row_has_the_same_bits_beside_any_rows_and_with_any_threads(
    native: NativeOps, quantized: bool
) -> None:
    rows = ((1, 3), (1, PART_LEN + 30), (4, 90), (100, 120), (1, 64))
    shape = Shape(rows=rows, head_dim=64, page_size=64)
    case = PagedCase(shape, torch.float32, quantized=quantized)
    together = case.attention(native, None)
    starts = case.batch.cu_seqlens.tolist()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(case.attention(native, None), together)
        for row, (start, end) in enumerate(pairwise(starts)):
            alone = replace(
                case.batch,
                cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32),
                context_lens=case.batch.context_lens[row : row + 1],
                page_table=case.batch.page_table[row : row + 1],
            )
            plan = native.plan_attention(alone, scale=0.3, window=None)
            assert torch.equal(plan.run(case.q[start:end], case.pool, 1), together[start:end])


@pytest.mark.parametrize("query_len", [1, 40])
def test_pages_behind_the_window_may_hold_anything(native: NativeOps, query_len: int) -> None:
    case = PagedCase(Shape(rows=((query_len, 200),)), torch.float32)
    expected = case.attention(native, 20)
    unseen = (200 - query_len - 20) // case.batch.page_size
    case.pool.values[case.batch.page_table[0, :unseen].long()] = torch.nan
    assert torch.equal(case.attention(native, 20), expected)


@pytest.mark.parametrize("query_len", [1, 12])
def test_scores_of_any_size(native: NativeOps, query_len: int) -> None:
    case = PagedCase(Shape(rows=((query_len, 80),), head_dim=16), torch.float32)
    case.q *= 1e6  # the exponentials of all scores but the largest are 0
    out = case.attention(native, None)
    values = case.contexts[0][:, 1]  # [context_len, num_kv_heads, head_dim]
    distances = out.flatten(0, 1)[:, None] - values.flatten(0, 1)
    assert distances.abs().amax(dim=2).amin(dim=1).max() < 1e-5


def test_queries_may_be_a_view(native: NativeOps) -> None:
    case = PagedCase(Shape(rows=((1, 30), (12, 20))), torch.float32)
    expected = case.attention(native, None)
    for view in (_beside_others(case.q), case.q.transpose(1, 2).contiguous().transpose(1, 2)):
        plan = native.plan_attention(case.batch, scale=0.3, window=None)
        assert torch.equal(plan.run(view, case.pool, 1), expected)


def _beside_others(q: Tensor) -> Tensor:
    """`q` as the first heads of a larger tensor."""
    return torch.cat((q, torch.full_like(q, torch.nan)), dim=1)[:, : q.shape[1]]


def test_one_plan_runs_every_layer(native: NativeOps) -> None:
    case = PagedCase(Shape(rows=((1, 30), (12, 20)), num_layers=2), torch.float32)
    case.pool.values[:, 0] = case.pool.values[:, 1] * 2
    plan = native.plan_attention(case.batch, scale=0.3, window=None)
    first, second = (plan.run(case.q / (2 - layer), case.pool, layer) for layer in (0, 1))
    torch.testing.assert_close(first, second * 2)
