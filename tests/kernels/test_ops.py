"""Every operation of each implementation against the float64 reference, over ragged shapes."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import in_groups
from paged_case import TOLERANCE, PagedCase, Shape, assert_close
from torch import Tensor

from pagewire.kernels import reference
from pagewire.kernels.ops import GROUP, AttentionBatch, GroupedActivation, Ops
from pagewire.kernels.quantized import dequantize

DTYPES = tuple(TOLERANCE)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(ops: Ops, dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 48, dtype=dtype) * 30, torch.randn(48, dtype=dtype)
    assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    heads = x.view(7, 3, 16)[:, 1:]  # strided, as a norm on each head sees it
    assert_close(ops.rms_norm(heads, weight[:16], 0.1), reference.rms_norm(heads, weight[:16], 0.1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(ops: Ops, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 7, 48, dtype=dtype)
    weight = torch.randn(48, dtype=dtype)
    total = x.double() + residual.double()

    normed, new_residual = ops.add_rms_norm(x, residual, weight, 1e-5)

    assert_close(new_residual, total)
    assert_close(normed, reference.rms_norm(new_residual, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(ops: Ops, dtype: torch.dtype) -> None:
    gate_up = torch.randn(7, 96, dtype=dtype) * 4
    gate, up = gate_up.chunk(2, dim=1)
    assert_close(ops.silu_mul(gate_up), reference.silu_mul(gate, up))


def test_quantize(ops: Ops) -> None:
    x = torch.zeros(1, 96)
    x[0, :5] = torch.tensor([127.0, -127.0, 0.5, 1.5, -2.5])
    x[0, 32:35] = torch.tensor([1270.0, 5.0, -1.25])  # well above the mean of the scales

    quantized = in_groups(ops, x)

    assert (quantized.groups.dtype, quantized.groups.shape) == (torch.uint8, (1, 3, 76))
    small, large, zeros = torch.split(quantized.groups[0], 1)
    assert small[0, :64].view(torch.int8).tolist() == [127, -127, 0, 2, -2, *[0] * 59]
    assert small[0, 64:72].view(torch.float32).tolist() == [1.0, 0.0]  # unit and sum
    assert small[0, 72:].view(torch.int32).tolist() == [0]
    assert large[0, :32].view(torch.int8).tolist() == [127, 0, 0, *[0] * 29]
    assert large[0, 32:64].view(torch.int8).tolist() == [0, 64, -16, *[0] * 29]
    assert large[0, 64:72].view(torch.float32).tolist() == [10 / 128, 1273.75]
    assert large[0, 72:].view(torch.int32).tolist() == [1]
    assert zeros.count_nonzero() == 0
    expected = x.round()  # halves to even
    expected[0, 34] = -1.25
    assert torch.equal(dequantize(quantized), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_within_half_a_step(ops: Ops, dtype: torch.dtype) -> None:
    x = torch.randn(7, 80, dtype=dtype) * torch.logspace(-3, 3, 7)[:, None].to(dtype)
    x[:, 40] = 10 * x.abs().amax(dim=1)

    quantized = in_groups(ops, x)

    units = quantized.groups[..., 64:68].view(torch.float32)[..., 0]
    steps = units.repeat_interleave(GROUP, dim=1)[:, :80]
    errors = (dequantize(quantized) - x.float()).abs() / steps
    assert errors.max() <= 0.5001
    refined = quantized.groups[..., 72:].view(torch.int32)[..., 0]
    assert refined.tolist() == [[0, 1, 0]] * 7


def test_quantize_takes_what_is_next_to_nothing_for_0(ops: Ops) -> None:
    x = torch.full((1, 64), 1e-38)
    x[0, 32:] = 1e-30
    quantized = in_groups(ops, x)
    assert quantized.groups[0, 0].count_nonzero() == 0
    torch.testing.assert_close(dequantize(quantized)[0, 32:], x[0, 32:], rtol=1e-2, atol=0)


def test_quantize_lets_no_nan_pass_for_a_number(ops: Ops) -> None:
    x = torch.ones(1, 64)
    x[0, 3] = torch.nan
    assert dequantize(in_groups(ops, x))[0, :32].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_quantize_their_results(ops: Ops, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 7, 48, dtype=dtype)
    weight = torch.randn(48, dtype=dtype)
    added, _ = ops.add_rms_norm(x, residual.clone(), weight, 1e-5)
    added_quantized, _ = ops.add_rms_norm(x, residual.clone(), weight, 1e-5, quantize=True)
    for plain, result in (
        (ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5, quantize=True)),
        (added, added_quantized),
        (ops.silu_mul(x), ops.silu_mul(x, quantize=True)),
    ):
        assert isinstance(plain, Tensor) and isinstance(result, GroupedActivation)
        expected = in_groups(ops, plain)
        assert result.num_features == plain.shape[1]
        assert torch.equal(result.groups, expected.groups)


# Of attention over K and V in 8 bits to attention over what they were before.
TOLERANCE_INT8 = 1.2e-2

RAGGED = ((1, 1), (5, 5), (1, 16), (7, 40), (1, 17), (1, 63), (1, 100), (64, 65), (1, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("page_size", [16, 64])
def test_attention_of_a_ragged_batch(
    ops: Ops, page_size: int, window: int | None, dtype: torch.dtype
) -> None:
    case = PagedCase(Shape(rows=RAGGED, page_size=page_size), dtype)
    assert_close(case.attention(ops, window), case.expected(window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("head_dim", [16, 64])  # the tiles of C++ alone, and both its kernels
def test_attention_over_an_int8_pool(
    ops: Ops, head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    case = PagedCase(Shape(rows=RAGGED, head_dim=head_dim), dtype, quantized=True)
    out = case.attention(ops, window)
    assert_close(out, case.expected(window))
    assert_close(out, case.expected(window, exact=True), TOLERANCE_INT8)


@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 1), (1, 8), (4, 1), (3, 3)])
def test_attention_with_any_grouping_of_heads(ops: Ops, num_kv_heads: int, group: int) -> None:
    shape = Shape(rows=((1, 30), (1, 31), (12, 20)), num_kv_heads=num_kv_heads, group=group)
    case = PagedCase(shape, torch.float32)
    assert_close(case.attention(ops, None), case.expected(None))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 80)).map(lambda row: (row[0], sum(row))),
        min_size=1,
        max_size=6,
    ),
    decode_contexts=st.lists(st.integers(1, 200), max_size=6),
    window=st.none() | st.integers(1, 100),
    page_size=st.sampled_from([16, 32]),
    quantized=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention_of_any_batch(
    ops: Ops,
    rows: list[tuple[int, int]],
    decode_contexts: list[int],
    window: int | None,
    page_size: int,
    quantized: bool,
    seed: int,
) -> None:
    rows += [(1, context) for context in decode_contexts]
    shape = Shape(rows=tuple(rows), page_size=page_size, group=2, head_dim=8, num_layers=2)
    case = PagedCase(shape, torch.float32, seed, quantized=quantized)
    assert_close(case.attention(ops, window), case.expected(window))


def test_a_chunked_prompt_attends_as_a_whole_one(ops: Ops) -> None:
    whole = PagedCase(Shape(rows=((90, 90),)), torch.float32)
    expected = whole.attention(ops, None)
    for start, end in ((0, 40), (40, 41), (41, 90)):
        batch = AttentionBatch(
            cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            page_table=whole.batch.page_table,
            positions=whole.batch.positions[start:end],
            slots=whole.batch.slots[start:end],
            page_size=16,
        )
        plan = ops.plan_attention(batch, scale=0.3, window=None)
        chunk = plan.run(whole.q[start:end], whole.pool, layer=1)
        assert_close(chunk, expected[start:end].double())


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What `rope_and_store` was given and gave, over a case whose pool it wrote to."""

    k: Tensor
    v: Tensor
    frequencies: Tensor
    rotated: Tensor


def store(case: PagedCase, ops: Ops) -> Stored:
    """Store random K and V in layer 2."""
    torch.manual_seed(1)
    num_tokens, head_dim = len(case.q), case.shape.head_dim
    k, v = torch.randn(2, num_tokens, case.shape.num_kv_heads, head_dim).to(case.q.dtype)
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = case.batch.positions[:, None] * frequencies
    rotated = ops.rope_and_store(
        case.q, k, v, (angles.cos(), angles.sin()), case.pool, 2, case.batch.slots
    )
    return Stored(k=k, v=v, frequencies=frequencies, rotated=rotated)


STORED_ROWS = ((3, 3), (20, 50), (1, 17))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_and_store(ops: Ops, dtype: torch.dtype) -> None:
    case = PagedCase(Shape(rows=STORED_ROWS), dtype)
    before = case.pool.values.clone()

    given = store(case, ops)

    positions = case.batch.positions
    assert_close(given.rotated, reference.rope(case.q, positions, given.frequencies))
    pages, slots = case.batch.slots // 16, case.batch.slots % 16
    stored = case.pool.values[pages, 2, :, :, slots]  # [num_tokens, num_kv_heads, 2, head_dim]
    assert_close(stored[:, :, 0], reference.rope(given.k, positions, given.frequencies))
    assert torch.equal(stored[:, :, 1], given.v)
    case.pool.values[pages, 2, :, :, slots] = torch.nan
    assert torch.equal(case.pool.values.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_and_store_in_int8(ops: Ops, dtype: torch.dtype) -> None:
    case = PagedCase(Shape(rows=STORED_ROWS), dtype, quantized=True)
    pool_values, pool_scales = case.pool.values, case.pool.scales
    assert pool_scales is not None
    before = pool_values.clone(), pool_scales.clone()

    given = store(case, ops)

    positions = case.batch.positions
    assert_close(given.rotated, reference.rope(case.q, positions, given.frequencies))
    pages, slots = case.batch.slots // 16, case.batch.slots % 16
    values = pool_values[pages, 2, :, :, slots]  # [num_tokens, num_kv_heads, 2, head_dim]
    scales = pool_scales[pages, 2, :, :, slots]  # [num_tokens, num_kv_heads, 2]
    exact_k = reference.rope(given.k, positions, given.frequencies)
    k_error = (values[:, :, 0] * scales[:, :, 0, None] - exact_k).abs()
    assert torch.all(k_error <= scales[:, :, 0, None] * 0.5001)
    assert bool((values[:, :, 0].abs().amax(dim=2) == 127).all())
    expected_values, expected_scales = reference.quantize(given.v)
    assert torch.equal(values[:, :, 1], expected_values)
    assert torch.equal(scales[:, :, 1], expected_scales.float())
    pool_values[pages, 2, :, :, slots] = 0
    pool_scales[pages, 2, :, :, slots] = torch.nan
    assert torch.equal(pool_values, before[0])
    assert torch.equal(pool_scales.view(torch.uint8), before[1].view(torch.uint8))


def test_a_vector_of_zeros_and_the_largest_one_survive_8_bits(ops: Ops) -> None:
    case = PagedCase(Shape(rows=((2, 2),), num_kv_heads=1, group=1), torch.float32, quantized=True)
    k = torch.stack((torch.zeros(1, 16), torch.full((1, 16), 3e38)))
    rope = torch.ones(2, 8), torch.zeros(2, 8)
    ops.rope_and_store(case.q, k, -k, rope, case.pool, 0, torch.tensor([0, 1]))
    assert case.pool.scales is not None
    assert case.pool.values[0, 0, 0, :, :2, 0].tolist() == [[0, 127], [0, -127]]
    scales = case.pool.scales[0, 0, 0, :, :2]
    torch.testing.assert_close(scales, torch.tensor([[1.0, 3e38 / 127]] * 2))


def test_a_pool_of_another_dtype_is_refused(ops: Ops) -> None:
    case = PagedCase(Shape(rows=((1, 30),)), torch.float32)
    half = case.q.half()
    with pytest.raises(ValueError, match=r"float16 and the pool is torch\.float32"):
        ops.plan_attention(case.batch, scale=0.3, window=None).run(half, case.pool, 1)
    k, rope = half[:, :2], (torch.ones(1, 8), torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"float16 and the pool is torch\.float32"):
        ops.rope_and_store(half, k, k, rope, case.pool, 1, case.batch.slots)
