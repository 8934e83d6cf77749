"""W8A8 and W4A16: how weights are rounded, and what an emulated matrix gives."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pagewire.kernels import w4a16, w8a8
from pagewire.kernels.emulated_linear import EmulatedLinear
from pagewire.kernels.quantized import quantize
from pagewire.kernels.quantized_linears import has_form, quantize_weight
from pagewire.kernels.quantized_matrix import QuantizedMatrix, consecutive_groups


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    magnitude=st.floats(1e-4, 1e3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_4_bits_are_the_nearest_of_16_levels(
    rows: int, columns: int, magnitude: float, seed: int
) -> None:
    weight = random(rows, columns, seed=seed) * magnitude
    matrix = w4a16.quantize_weight(weight)
    assert int(matrix.quants.max()) <= 15
    # Half a step, of which the zero took half, and what float16 rounds from the scale.
    steps = matrix.scales.float()[:, matrix.group_of]
    assert bool(((matrix.dequantized() - weight).abs() <= steps * 1.02).all())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_4_bits_hold_groups_of_one_value(value: float) -> None:
    matrix = w4a16.quantize_weight(torch.full((2, 130), value))
    torch.testing.assert_close(matrix.dequantized(), torch.full((2, 130), value), rtol=1e-3, atol=0)


@given(rows=st.integers(1, 5), columns=st.integers(1, 300), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_fp8_keeps_three_bits_of_every_number(rows: int, columns: int, seed: int) -> None:
    x = random(rows, columns, seed=seed)
    values, scales = w8a8.quantize_rows(x, w8a8.FP8)
    restored = values.float() * scales[:, None]
    # Half of the last of three bits; subnormal numbers have steps of 2^-9 of a scale.
    bound = torch.maximum(x.abs() / 16, scales[:, None] / 2**10)
    assert bool(((restored - x).abs() <= bound * 1.0001).all())
    torch.testing.assert_close(restored.abs().amax(1), x.abs().amax(1))


@pytest.mark.parametrize("dtype", w8a8.DTYPES, ids=str)
def test_rows_of_0_and_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, torch.nan]])
    values, scales = w8a8.quantize_rows(x, dtype)
    restored = values.float() * scales[:, None]
    assert torch.equal(restored[0], x[0])
    assert bool(restored[1].isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_alone_are_rounded_for_w4a16(dtype: torch.dtype) -> None:
    weight, bias, x = random(24, 200), random(24, seed=1), random(7, 200, seed=2)
    matrix = w4a16.quantize_weight(weight)
    linear = EmulatedLinear(matrices=(matrix,), bias=bias, dtype=dtype)
    x = x.to(dtype)
    out = linear(x)
    assert out.dtype == dtype
    expected = x.double() @ matrix.dequantized().double().T + bias.double()
    assert relative_error(out, expected) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(("dtype", "loss"), [(torch.int8, 2e-2), (w8a8.FP8, 5e-2)], ids=str)
def test_8_bits_round_activations_too(dtype: torch.dtype, loss: float) -> None:
    weight, x = random(24, 200), random(7, 200, seed=2)
    matrix = w8a8.quantize_weight(weight, dtype)
    linear = EmulatedLinear(matrices=(matrix,), bias=None, dtype=torch.float32)
    values, scales = w8a8.quantize_rows(x, dtype)
    expected = (values.double() * scales.double()[:, None]) @ matrix.dequantized().double().T
    assert relative_error(linear(x), expected) < 1e-6
    assert relative_error(linear(x), x @ weight.T) < loss


def test_matrices_lie_below_one_another() -> None:
    parts = tuple(w4a16.quantize_weight(random(rows, 64, seed=rows)) for rows in (3, 5))
    linear = EmulatedLinear(matrices=parts, bias=None, dtype=torch.float32)
    x = random(2, 64)
    expected = torch.cat([x @ part.dequantized().T for part in parts], dim=1)
    torch.testing.assert_close(linear(x), expected)
    assert linear.num_bytes == sum(part.num_bytes for part in parts)


def test_a_quantised_activation_is_refused() -> None:
    matrix = w4a16.quantize_weight(random(3, 64))
    linear = EmulatedLinear(matrices=(matrix,), bias=None, dtype=torch.float32)
    with pytest.raises(TypeError, match="takes no quantised activation"):
        linear(quantize(random(2, 64)))


def test_rows_and_columns_of_a_matrix_are_those_of_its_weights() -> None:
    matrix = w4a16.quantize_weight(random(10, 300))
    whole = matrix.dequantized()
    assert torch.equal(matrix.rows(range(3, 7)).dequantized(), whole[3:7])
    assert torch.equal(matrix.columns(range(100, 260)).dequantized(), whole[:, 100:260])


def test_4_bits_run_in_groups_of_128_or_a_multiple() -> None:
    def matrix(group_of: Tensor) -> QuantizedMatrix:
        num_groups = int(group_of.max()) + 1
        return QuantizedMatrix(
            quants=torch.zeros(2, len(group_of), dtype=torch.uint8),
            scales=torch.ones(2, num_groups),
            zeros=None,
            group_of=group_of,
        )

    for group_size in (128, 256, None):
        assert has_form(matrix(consecutive_groups(520, group_size)))
    for group_size in (64, 192):
        assert not has_form(matrix(consecutive_groups(520, group_size)))
    assert not has_form(matrix(torch.arange(256) % 2))
    # What a rank has of a group is fine, if no run of 128 has parts of two.
    assert has_form(matrix(consecutive_groups(256, 128)).columns(range(128, 200)))
    assert not has_form(matrix(consecutive_groups(256, 128)).columns(range(64, 192)))


def test_8_bits_run_with_one_scale_for_each_output() -> None:
    matrix = quantize_weight(random(4, 64), torch.int8)
    assert has_form(matrix)
    zeros = torch.zeros(4, 1, dtype=torch.int8)
    assert has_form(replace(matrix, zeros=zeros))
    assert not has_form(replace(matrix, zeros=zeros + 1))
    grouped = replace(matrix, scales=torch.ones(4, 2), group_of=consecutive_groups(64, 32))
    assert not has_form(grouped)


def test_blocks_of_4_bits_need_4_bits_in_whole_blocks() -> None:
    eight = QuantizedMatrix(
        quants=torch.zeros(2, 64, dtype=torch.int8),
        scales=torch.ones(2, 1),
        zeros=None,
        group_of=consecutive_groups(64, None),
    )
    with pytest.raises(ValueError, match="no 4-bit blocks"):
        eight.int4_blocks()
    permuted = QuantizedMatrix(
        quants=torch.zeros(2, 64, dtype=torch.uint8),
        scales=torch.ones(2, 2),
        zeros=None,
        group_of=torch.arange(64) % 2,
    )
    with pytest.raises(ValueError, match="no runs of 32"):
        permuted.int4_blocks()
