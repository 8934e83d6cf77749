"""What is particular to vectors and addresses: odd sizes, values at the edges, wrong tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from implementations import in_groups
from paged_case import poisoned_pool

from pagewire.kernels import reference
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.ops import GroupedActivation, Ops
from pagewire.kernels.quantized import dequantize
from pagewire.kernels.torch_ops import TorchOps


@pytest.fixture
def native(ops: Ops) -> NativeOps:
    if not isinstance(ops, NativeOps):
        pytest.skip("not C++")
    return ops


@given(rows=st.integers(1, 5), dim=st.integers(1, 70), seed=st.integers(0, 100))
def test_any_size(ops: Ops, rows: int, dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, gate_up = torch.randn(rows, dim), torch.randn(rows, 2 * dim)
    weight = torch.randn(dim)

    normed, total = ops.add_rms_norm(x, torch.ones(rows, dim), weight, 1e-5)

    assert torch.equal(total, x + 1)
    for result, expected in (
        (ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)),
        (normed, reference.rms_norm(x + 1, weight, 1e-5)),
        (ops.silu_mul(gate_up), reference.silu_mul(gate_up[:, :dim], gate_up[:, dim:])),
    ):
        assert isinstance(result, torch.Tensor)
        torch.testing.assert_close(result.double(), expected, rtol=2e-6, atol=2e-6)


@given(rows=st.integers(1, 4), head_dim=st.integers(1, 40).map(lambda half: 2 * half))
def test_rope_of_any_head_writes_its_slots_only(ops: Ops, rows: int, head_dim: int) -> None:
    torch.manual_seed(0)
    fused = torch.randn(rows, 5, head_dim)  # 3 query heads, one of keys and one of values
    angles = torch.randn(rows, head_dim // 2)
    slots = torch.tensor([0, 15, 16, 47])[:rows]  # the edges of pages, and of the pool
    pool = poisoned_pool(
        3, torch.float32, num_layers=2, num_kv_heads=1, page_size=16, head_dim=head_dim
    )

    q = ops.rope_and_store(
        fused[:, :3], fused[:, 3:4], fused[:, 4:], (angles.cos(), angles.sin()), pool, 1, slots
    )

    # One position whose angles are the frequencies.
    for row in range(rows):
        turned = reference.rope(fused[row : row + 1, :4], torch.ones(1), angles[row])
        torch.testing.assert_close(q[row].double(), turned[0, :3], rtol=1e-5, atol=1e-5)
        stored = pool.values[slots[row] // 16, 1, 0, :, slots[row] % 16]
        torch.testing.assert_close(stored[0].double(), turned[0, 3], rtol=1e-5, atol=1e-5)
        assert torch.equal(stored[1], fused[row, 4])
    assert int(pool.values.isnan().logical_not().sum()) == rows * 2 * head_dim


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_is_not_hidden(ops: Ops, dtype: torch.dtype) -> None:
    x = torch.ones(2, 40, dtype=dtype)
    x[1, 37] = torch.nan

    quantized = in_groups(ops, x)
    normed = ops.rms_norm(x, torch.ones(40, dtype=dtype), 1e-5)
    product = ops.silu_mul(x)

    assert dequantize(quantized).isnan().any(dim=1).tolist() == [False, True]
    assert normed.isnan().all(dim=1).tolist() == [False, True]
    assert isinstance(product, torch.Tensor)
    assert product.isnan().sum(dim=1).tolist() == [0, 1]


def test_silu_at_the_ends_of_the_range(ops: Ops) -> None:
    gate = torch.tensor([-3e38, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 3e38])
    product = ops.silu_mul(torch.cat((gate, torch.ones(9)))[None])
    expected = torch.tensor([0.0, 0.0, 0.0, -20 / (1 + torch.e**20), 0.0, 20.0, 88.0, 200.0, 3e38])
    torch.testing.assert_close(product, expected[None], rtol=1e-6, atol=1e-30)


def test_quantisation_of_the_smallest_values(ops: Ops) -> None:
    quantized = in_groups(ops, torch.tensor([[1e-44, 0.0], [1e-30, -1e-30]]))
    assert quantized.groups[:, 0, :2].view(torch.int8).tolist() == [[0, 0], [127, -127]]
    assert not dequantize(quantized)[0].any()


@given(rows=st.integers(1, 5), dim=st.integers(1, 150), seed=st.integers(0, 100))
def test_every_implementation_quantises_alike(ops: Ops, rows: int, dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, dim) * torch.logspace(-6, 6, rows)[:, None]
    x[:, :: dim // 3 + 1] *= torch.randint(1, 100, (1,))  # some groups have remainders
    expected, result = TorchOps().quantize(x), in_groups(ops, x)
    assert torch.equal(result.groups, expected.groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_implementation_stores_the_same_8_bits(native: NativeOps, dtype: torch.dtype) -> None:
    num_tokens, head_dim = 200, 64
    k, v = torch.randn(2, num_tokens, 3, head_dim).to(dtype)
    angles = torch.randn(num_tokens, head_dim // 2)
    pools = []
    for ops in (native, TorchOps()):
        pool = poisoned_pool(
            4, torch.int8, num_layers=1, num_kv_heads=3, page_size=64, head_dim=head_dim
        )
        slots = torch.arange(num_tokens)
        ops.rope_and_store(k, k, v, (angles.cos(), angles.sin()), pool, 0, slots)
        pools.append(pool)
    mine, theirs = pools
    assert mine.scales is not None and theirs.scales is not None
    torch.testing.assert_close(mine.scales, theirs.scales, equal_nan=True)
    assert torch.equal(mine.values[..., 1, :, :], theirs.values[..., 1, :, :])
    # One fused rounding more or less in a rotation moves a value that lies between two steps.
    distance = (mine.values[..., 0, :, :].int() - theirs.values[..., 0, :, :].int()).abs()
    assert int(distance.max()) <= 1
    assert float(distance.float().mean()) < 1e-3


def test_results_do_not_depend_on_threads(native: NativeOps) -> None:
    gate_up, weight = torch.randn(64, 2048), torch.randn(2048)  # enough for more than one thread
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            quantized = native.silu_mul(gate_up, quantize=True)
            assert isinstance(quantized, GroupedActivation)
            normed = native.rms_norm(gate_up, weight, 1e-5)
            results.append((normed, quantized.groups))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_tensors_that_do_not_fit_are_refused(native: NativeOps) -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"torch\.float32, torch\.bfloat16"):
        native.rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-5)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        native.quantize(x.double())
