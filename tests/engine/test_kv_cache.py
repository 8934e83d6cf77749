"""The pool of a KV cache: the views of the model are the bytes that workers exchange."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_kernels import native_library
from transformers import PreTrainedModel

from pagewire.engine.batch import Batch, BatchRow
from pagewire.engine.errors import DeviceMemoryError, KernelError
from pagewire.engine.kv_cache import KVCache
from pagewire.engine.kv_cache_dtype import KVCacheDtype
from pagewire.engine.load import load_engine
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kernels.kv_pool import KVPool
from pagewire.kv_transfer.layout import DTYPE_BYTES, PAGE_SIZES, KVLayout

layouts = st.builds(
    KVLayout,
    page_size=st.sampled_from(PAGE_SIZES),
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 64, 80]),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
)


@given(layouts, st.integers(1, 3))
def test_values_and_scales_are_all_bytes_of_a_page_once(layout: KVLayout, num_pages: int) -> None:
    cache = KVCache(layout, num_pages)
    pages = cache.pages
    views = [view for view in (pages.values, pages.scales) if view is not None]
    cache.pool.fill_(0xFF)
    for view in views:
        view.zero_()
    assert not cache.pool.any()
    assert sum(view.nbytes for view in views) == cache.pool.nbytes
    assert pages.segment_bytes == layout.head_bytes


def test_a_pool_that_transports_do_not_reach_is_refused() -> None:
    layout = KVLayout(page_size=16, num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32")
    with pytest.raises(DeviceMemoryError, match=r"on meta.*as DevicePages does"):
        KVCache(layout, 1, device="meta").buffer()


def test_scales_lie_behind_the_values_of_their_head() -> None:
    layout = KVLayout(page_size=16, num_layers=2, num_kv_heads=3, head_dim=8, dtype="int8")
    cache = KVCache(layout, 2)
    cache.pool.zero_()
    assert cache.pages.scales is not None
    cache.pages.values[1, 1, 2, 1, 15, 7] = -1  # the last of page, layer, head, K and V, slot
    cache.pages.scales[1, 1, 2, 0, 0] = 1.0
    segment = cache.buffer()[-layout.head_bytes :]
    values, scales = segment[: 2 * 16 * 8], segment[2 * 16 * 8 :].cast("f")
    assert bytes(values) == bytes(2 * 16 * 8 - 1) + b"\xff"
    assert scales.tolist() == [1.0] + [0.0] * 31


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (torch.zeros(4, 100, dtype=torch.uint8), r"\[4, 100\]; give uint8 \[num_pages, 512\]"),
        (torch.zeros(4, 512), "torch.float32"),
        (torch.zeros(8, 512, dtype=torch.uint8)[::2], "not contiguous"),
    ],
)
def test_memory_that_is_no_pool_is_refused(data: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        KVPool(data, torch.bfloat16, num_layers=1, num_kv_heads=1, page_size=16, head_dim=8)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "kernels", "stored", "tolerance"),
    [
        (KVCacheDtype.INT8, "auto", "int8", 0.02),
        (KVCacheDtype.INT8, "torch", "int8", 0.02),
        (KVCacheDtype.FP8, "torch", "float8_e4m3fn", 0.1),
    ],
)
def test_logits_over_a_cache_of_8_bits_are_close(
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    kv_cache_dtype: KVCacheDtype,
    kernels: str,
    stored: str,
    tolerance: float,
) -> None:
    make_model("llama", initializer_range=0.05)
    # The second step decodes behind a prompt of several pages.
    steps = [
        BatchRow(
            request_id="r1",
            token_ids=token_ids,
            start=start,
            page_table=[3, 1, 2],
            sampling=SamplingParams(),
        )
        for start, token_ids in ((0, range(150)), (150, [7]))
    ]
    exact, quantized = (
        load_engine(tmp_path, dtype="float32", num_pages=4, kv_cache_dtype=dtype, kernels=kernels)
        for dtype in (KVCacheDtype.AUTO, kv_cache_dtype)
    )
    assert (exact.layout.dtype, quantized.layout.dtype) == ("float32", stored)
    for row in steps:
        expected, found = (runner.forward(Batch(rows=(row,))) for runner in (exact, quantized))
        error = (found - expected).norm() / expected.norm()
        assert 0 < error < tolerance


def test_an_fp8_cache_without_kernels_for_it_is_refused(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model("llama")
    options: dict[str, Any] = {"num_pages": 1, "kv_cache_dtype": KVCacheDtype.FP8}
    with pytest.raises(KernelError, match="no kernels for device meta; choose int8"):
        load_engine(tmp_path, device="meta", kernels="torch", **options)
    native_library()
    with pytest.raises(KernelError, match=r"no kernels for device cpu; .* or kernels torch, which"):
        load_engine(tmp_path, **options)
