"""K and V in 8 bits: what is stored of a vector, and who takes which pool."""

import pytest
import torch
from paged_case import PagedCase, Shape, poisoned_pool
from torch import Tensor

from pagewire.kernels.kv_pool import KVPool, quantize_vectors
from pagewire.kernels.native_library import NativeLibraryError, find_library
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.ops import Ops
from pagewire.kernels.torch_ops import TorchOps

FP8 = torch.float8_e4m3fn


def fp8_pool(num_pages: int) -> KVPool:
    return poisoned_pool(num_pages, FP8, num_layers=2, num_kv_heads=3, page_size=64, head_dim=16)


def store(ops: Ops, pool: KVPool, kv: Tensor, slots: Tensor) -> None:
    """kv: [num_tokens, 3, 16], both as k and as v, not rotated."""
    rope = torch.ones(len(kv), 8), torch.zeros(len(kv), 8)
    ops.rope_and_store(kv, kv, kv, rope, pool, 1, slots)


def test_fp8_vectors_keep_three_bits_of_every_number() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, 64, generator=generator) * torch.logspace(-3, 3, 50)[:, None, None]
    x[3, 1] = 0
    values, scales = quantize_vectors(x, FP8)
    assert (values.dtype, scales.dtype) == (FP8, torch.float32)
    restored = values.float() * scales[..., None]
    bound = torch.maximum(x.abs() / 16, scales[..., None] / 2**10)
    assert bool(((restored - x).abs() <= bound * 1.0001).all())
    assert scales[3, 1] == 1


def test_torch_stores_k_and_v_in_fp8_and_nothing_else() -> None:
    pool = fp8_pool(3)
    kv = torch.randn(70, 3, 16, generator=torch.Generator().manual_seed(0))
    slots = torch.arange(64, 134)
    store(TorchOps(), pool, kv, slots)
    expected, expected_scales = quantize_vectors(kv, FP8)
    assert pool.scales is not None
    for kind in (0, 1):
        values = pool.values[slots // 64, 1, :, kind, slots % 64]
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(pool.scales[slots // 64, 1, :, kind, slots % 64], expected_scales)
    assert bool(pool.scales[0].isnan().all()) and bool(pool.scales[:, 0].isnan().all())


def test_cpp_takes_no_fp8() -> None:
    try:
        ops = NativeOps(find_library())
    except NativeLibraryError as error:
        pytest.skip(str(error))
    sentence = "the pool is torch.float8_e4m3fn; it must have their dtype or int8"
    with pytest.raises(ValueError, match=sentence):
        store(ops, fp8_pool(1), torch.zeros(1, 3, 16), torch.zeros(1, dtype=torch.int64))
    case = PagedCase(Shape(rows=((1, 5),), num_kv_heads=3, group=1), torch.float32)
    plan = ops.plan_attention(case.batch, scale=1.0, window=None)
    with pytest.raises(ValueError, match=sentence):
        plan.run(case.q, fp8_pool(1), 0)
