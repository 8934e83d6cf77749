"""RoPE and the KV write against the float64 reference; what is not written stays NaN."""

from dataclasses import replace

import pytest
import torch
from paged_case import TOLERANCE, PagedCase, Shape, assert_close, poisoned_pool
from torch import Tensor

from pagewire.kernels import reference
from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.rope_store import rope_and_store
from pagewire.kernels.kv_pool import quantize_vectors

ROWS = ((3, 3), (5, 20), (1, 17))


def angles(case: PagedCase) -> tuple[Tensor, Tensor]:
    """(of each pair of a head, of each token's pairs)."""
    head_dim = case.shape.head_dim
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return frequencies, case.batch.positions[:, None] * frequencies


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_rope_and_store(head_dim: int, dtype: torch.dtype) -> None:
    case = PagedCase(Shape(rows=ROWS, head_dim=head_dim, num_kv_heads=3, group=2), dtype)
    before = case.pool.values.clone()
    # Parts of one tensor, as a model has them.
    q, k, v = torch.split(torch.randn(9, 12, head_dim).to(dtype), [6, 3, 3], dim=1)
    frequencies, angle = angles(case)
    slots = case.batch.slots.clone()
    slots[4] = -1

    rotated = rope_and_store(q, k, v, (angle.cos(), angle.sin()), case.pool, 2, slots)

    positions = case.batch.positions
    assert_close(rotated, reference.rope(q, positions, frequencies))
    written = slots >= 0
    pages, offsets = slots[written] // 16, slots[written] % 16
    stored = case.pool.values[pages, 2, :, :, offsets]  # [num_tokens, num_kv_heads, 2, head_dim]
    assert_close(stored[:, :, 0], reference.rope(k, positions, frequencies)[written])
    assert torch.equal(stored[:, :, 1], v[written])
    case.pool.values[pages, 2, :, :, offsets] = torch.nan
    assert torch.equal(case.pool.values.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("pool_dtype", "loss"), [(torch.int8, 1.2e-2), (torch.float8_e4m3fn, 4e-2)]
)
def test_a_pool_in_8_bits(pool_dtype: torch.dtype, loss: float, dtype: torch.dtype) -> None:
    """V to the bit as tokens are quantised elsewhere, K as the rotation in float32 is."""
    case = PagedCase(Shape(rows=ROWS, num_kv_heads=3, group=2), dtype)
    num_pages, num_layers, num_kv_heads, _, page_size, head_dim = case.pool.values.shape
    pool = poisoned_pool(
        num_pages,
        pool_dtype,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        head_dim=head_dim,
    )
    assert pool.scales is not None
    before = pool.scales.clone()
    q, k, v = torch.split(torch.randn(9, 12, 16).to(dtype), [6, 3, 3], dim=1)
    v[2] = 0
    frequencies, angle = angles(case)
    slots = case.batch.slots.clone()
    slots[4] = -1

    rotated = rope_and_store(q, k, v, (angle.cos(), angle.sin()), pool, 2, slots)

    positions = case.batch.positions
    assert_close(rotated, reference.rope(q, positions, frequencies))
    written = slots >= 0
    pages, offsets = slots[written] // 16, slots[written] % 16
    values = pool.values[pages, 2, :, :, offsets]  # [num_tokens, num_kv_heads, 2, head_dim]
    scales = pool.scales[pages, 2, :, :, offsets]
    v_values, v_scales = quantize_vectors(v[written].float(), pool_dtype)
    assert torch.equal(values[:, :, 1].view(torch.uint8), v_values.view(torch.uint8))
    assert torch.equal(scales[:, :, 1], v_scales)
    exact = reference.rope(k, positions, frequencies)[written]
    assert_close(values[:, :, 0].float() * scales[:, :, 0][..., None], exact, loss)
    pool.scales[pages, 2, :, :, offsets] = torch.nan
    assert torch.equal(pool.scales.isnan(), before.isnan())


def test_what_does_not_fit_is_refused() -> None:
    case = PagedCase(Shape(rows=((4, 4),)), torch.float32)
    _, angle = angles(case)
    rope, slots = (angle.cos(), angle.sin()), case.batch.slots
    k = case.q[:, :2]
    with pytest.raises(KernelArgumentError, match="the heads of k are strided"):
        rope_and_store(case.q, case.q[:, ::3], k, rope, case.pool, 2, slots)
    with pytest.raises(KernelArgumentError, match=r"v is \[4, 6, 16\]; give \[4, 2, 16\]"):
        rope_and_store(case.q, k, case.q, rope, case.pool, 2, slots)
    with pytest.raises(KernelArgumentError, match=r"cosine is \[4, 4\]; give \[4, 8\]"):
        rope_and_store(case.q, k, k, (rope[0][:, :4], rope[1]), case.pool, 2, slots)
    with pytest.raises(KernelArgumentError, match=r"slots is torch\.int32; give torch\.int64"):
        rope_and_store(case.q, k, k, rope, case.pool, 2, slots.int())
    wide = PagedCase(replace(case.shape, head_dim=32), torch.float32)
    with pytest.raises(KernelArgumentError, match="head_dim is 16 and the pool's 32"):
        rope_and_store(case.q, k, k, rope, wide.pool, 2, slots)
