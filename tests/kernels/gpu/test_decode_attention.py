"""Decode attention against the float64 reference, over pools that are NaN where nobody may look."""

from dataclasses import replace

import pytest
import torch
from paged_case import TOLERANCE, PagedCase, Shape, assert_close, in_fp8
from torch import Tensor

from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.decode_attention import choose_num_splits, decode_attention

LENGTHS = ((1, 1), (1, 16), (1, 31), (1, 70))
INT8_LOSS = 1.2e-2  # of a result, from K and V in 8 bits


def attend(
    case: PagedCase, *, window: int | None = None, num_splits: int = 1, tma: bool = False
) -> Tensor:
    return decode_attention(
        case.q, case.pool, 1, case.batch, scale=0.3, window=window, num_splits=num_splits, tma=tma
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_splits", "tma"), [(1, False), (1, True), (4, False)])
def test_ragged_contexts(num_splits: int, tma: bool, dtype: torch.dtype) -> None:
    case = PagedCase(Shape(rows=LENGTHS), dtype)
    assert_close(attend(case, num_splits=num_splits, tma=tma), case.expected(None))


@pytest.mark.parametrize("window", [1, 16, 20, 1000])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_window(num_splits: int, window: int) -> None:
    case = PagedCase(Shape(rows=((1, 5), (1, 48), (1, 70))), torch.float32)
    assert_close(attend(case, window=window, num_splits=num_splits), case.expected(window))


@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 1), (3, 4), (1, 24)])
def test_any_grouping_of_heads(num_kv_heads: int, group: int) -> None:
    shape = Shape(rows=((1, 20),), num_kv_heads=num_kv_heads, group=group)
    case = PagedCase(shape, torch.float32)
    assert_close(attend(case), case.expected(None))


def test_pages_and_heads_of_a_real_model() -> None:
    case = PagedCase(Shape(rows=((1, 65), (1, 130)), page_size=64, head_dim=128), torch.bfloat16)
    assert_close(attend(case, num_splits=2, tma=True), case.expected(None))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_splits", "tma"), [(1, True), (4, False)])
def test_a_pool_in_8_bits(num_splits: int, tma: bool, dtype: torch.dtype) -> None:
    case = PagedCase(Shape(rows=LENGTHS), dtype, quantized=True)
    out = attend(case, num_splits=num_splits, tma=tma)
    assert_close(out, case.expected(None))
    assert_close(out, case.expected(None, exact=True), INT8_LOSS)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_a_pool_in_fp8(num_splits: int) -> None:
    case = in_fp8(PagedCase(Shape(rows=LENGTHS), torch.bfloat16))
    out = attend(case, num_splits=num_splits)
    assert_close(out, case.expected(None))
    assert_close(out, case.expected(None, exact=True), 4e-2)


def test_splits_fill_the_gpu() -> None:
    def splits(num_rows: int, max_pages: int = 1000) -> int:
        return choose_num_splits(num_rows, num_kv_heads=8, max_pages=max_pages, num_sms=132)

    assert [splits(rows) for rows in (1, 8, 32, 64, 256)] == [32, 8, 2, 1, 1]
    assert splits(1, max_pages=3) == 4  # more would have nothing to do


def test_what_does_not_fit_is_refused() -> None:
    case = PagedCase(Shape(rows=((1, 20),)), torch.float32)
    batch, pool = case.batch, case.pool

    def refused(problem: str, q: Tensor, layer: int = 1, num_splits: int = 1) -> None:
        with pytest.raises(KernelArgumentError, match=problem):
            decode_attention(q, pool, layer, batch, scale=1.0, window=None, num_splits=num_splits)

    refused(r"q torch\.float16, pool torch\.float32", case.q.half())
    refused("q is not contiguous", case.q.transpose(1, 2).contiguous().transpose(1, 2))
    refused("5 heads share 2 KV heads", case.q[:, :5].contiguous())
    refused("head_dim is 8 and the pool's 16", case.q[..., :8].contiguous())
    refused("layer is 3; the pool has 3", case.q, layer=3)
    refused("q has 2 tokens for 1 rows", case.q.repeat(2, 1, 1))
    refused("num_splits is 3", case.q, num_splits=3)


def test_lengths_that_are_strided_are_refused() -> None:
    case = PagedCase(Shape(rows=((1, 20), (1, 7))), torch.float32)
    strided = torch.stack((case.batch.context_lens,) * 2, dim=1)[:, 0]
    batch = replace(case.batch, context_lens=strided)
    with pytest.raises(KernelArgumentError, match="context_lens is not contiguous"):
        decode_attention(case.q, case.pool, 0, batch, scale=1.0, window=None, num_splits=1)
