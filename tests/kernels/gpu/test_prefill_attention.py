"""Prefill attention against the float64 reference; whatever nobody may look at is NaN."""

import pytest
import torch
from paged_case import TOLERANCE, PagedCase, Shape, assert_close, in_fp8
from torch import Tensor

from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.prefill_attention import prefill_attention
from pagewire.kernels.ops import AttentionBatch

# (tokens, context): whole prompts, later chunks, tokens of decode; parts of tiles and several.
RAGGED = ((5, 5), (1, 40), (50, 66), (1, 1), (16, 16))


def attend(
    case: PagedCase, *, window: int | None = None, tma: bool = False, invariant: bool = False
) -> Tensor:
    return prefill_attention(
        case.q,
        case.pool,
        1,
        case.batch,
        scale=0.3,
        window=window,
        tma=tma,
        invariant=invariant,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tma", [False, True])
def test_a_ragged_batch(tma: bool, dtype: torch.dtype) -> None:
    case = PagedCase(Shape(rows=RAGGED), dtype)
    assert_close(attend(case, tma=tma), case.expected(None))


@pytest.mark.parametrize("window", [1, 16, 20, 1000])
def test_a_window(window: int) -> None:
    case = PagedCase(Shape(rows=((40, 70), (1, 40), (5, 5))), torch.float16)
    assert_close(attend(case, window=window), case.expected(window))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_pool_in_8_bits(dtype: torch.dtype) -> None:
    case = PagedCase(Shape(rows=((40, 70), (1, 40), (5, 5))), dtype, quantized=True)
    out = attend(case, tma=dtype is torch.bfloat16)
    assert_close(out, case.expected(None))
    assert_close(out, case.expected(None, exact=True), 1.2e-2)


def test_a_pool_in_fp8() -> None:
    case = in_fp8(PagedCase(Shape(rows=((40, 70), (1, 40), (5, 5))), torch.float16))
    out = attend(case)
    assert_close(out, case.expected(None))
    assert_close(out, case.expected(None, exact=True), 4e-2)


@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 1), (3, 4), (1, 24)])
def test_any_grouping_of_heads(num_kv_heads: int, group: int) -> None:
    shape = Shape(rows=((12, 20),), num_kv_heads=num_kv_heads, group=group)
    case = PagedCase(shape, torch.float32)
    assert_close(attend(case), case.expected(None))


def test_pages_and_heads_of_a_real_model() -> None:
    case = PagedCase(Shape(rows=((50, 130),), page_size=64, head_dim=128), torch.bfloat16)
    assert_close(attend(case, tma=True), case.expected(None))


@pytest.mark.parametrize("window", [None, 20])
def test_an_invariant_batch(window: int | None) -> None:
    case = PagedCase(Shape(rows=((40, 70), (1, 40), (5, 5))), torch.float16)
    assert_close(attend(case, window=window, invariant=True), case.expected(window))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("window", "quantized"), [(None, False), (20, False), (None, True)])
def test_a_chunked_prompt_attends_as_a_whole_one_to_the_bit(
    window: int | None, quantized: bool, dtype: torch.dtype
) -> None:
    whole = PagedCase(Shape(rows=((50, 50),), num_kv_heads=1), dtype, quantized=quantized)
    expected = attend(whole, window=window, invariant=True)
    for start, end in ((0, 25), (25, 26), (26, 49), (49, 50)):
        batch = AttentionBatch(
            cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            page_table=whole.batch.page_table,
            positions=whole.batch.positions[start:end],
            slots=whole.batch.slots[start:end],
            page_size=16,
        )
        chunk = prefill_attention(
            whole.q[start:end], whole.pool, 1, batch, scale=0.3, window=window, invariant=True
        )
        assert torch.equal(chunk, expected[start:end])


def test_fewer_tokens_than_rows_are_refused() -> None:
    case = PagedCase(Shape(rows=((2, 2), (1, 5))), torch.float32)
    with pytest.raises(KernelArgumentError, match="q has 1 tokens for 2 rows"):
        prefill_attention(case.q[:1], case.pool, 1, case.batch, scale=1.0, window=None)
