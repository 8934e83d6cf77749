"""Matrices in 8 and 4 bits against the float64 product of what they stand for."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from native_kernels import native_library
from torch import Tensor

from pagewire.kernels.int4_linear import Int4Blocks, concatenated, int4_linear
from pagewire.kernels.int8_linear import int8_linear, quantize_weight
from pagewire.kernels.native_library import NativeLibrary
from pagewire.kernels.native_quantized_linear import packed, quantized_panels
from pagewire.kernels.ops import GROUP, GroupedActivation, Linear
from pagewire.kernels.quantized import dequantize, quantize

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
TO_UNQUANTISED = 1e-2  # 8 bits of weights and of activations
SMALLEST_FLOAT16 = 2.0**-24
# Row counts around the tiles of the kernels, output channels around their panels.
ROWS = (1, 2, 3, 7, 8, 9, 33)
SHAPES = ((16, 32), (48, 96), (51, 64), (7, 160), (83, 192))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_blocks(out_features: int, in_features: int) -> Int4Blocks:
    shape = (out_features, in_features // GROUP)
    return Int4Blocks(
        quants=torch.randint(256, (*shape, GROUP // 2), dtype=torch.uint8),
        scales=torch.rand(shape).half(),
        minima=-8 * torch.rand(shape).half(),
    )


def activations(rows: int, num_features: int) -> GroupedActivation:
    """Of every second token one feature is so large that its group has remainders."""
    x = torch.randn(rows, num_features)
    x[::2, 3] *= 100
    return quantize(x)


def dequantized(blocks: Int4Blocks) -> Tensor:
    quants = torch.cat((blocks.quants & 15, blocks.quants >> 4), dim=2).double()
    values = quants * blocks.scales.double()[..., None] + blocks.minima.double()[..., None]
    return values.flatten(1)


def product(x: GroupedActivation, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = dequantize(x).double() @ weight.double().T
    return out if bias is None else out + bias.double()


def assert_close(value: Tensor, expected: Tensor) -> None:
    error = (value.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[value.dtype], error


def check_int8(dtype: torch.dtype, library: NativeLibrary | None) -> None:
    for out_features, in_features in (*SHAPES, (17, 45)):
        weight = torch.randn(out_features, in_features)
        exact = quantize_weight(weight).dequantized()[:, :in_features]
        for bias in (None, torch.randn(out_features)):
            linear = int8_linear(weight, bias, dtype=dtype, library=library)
            for rows in ROWS:
                x = activations(rows, in_features)
                result = linear(x)
                assert (result.dtype, result.shape) == (dtype, (rows, out_features))
                assert_close(result, product(x, exact, bias))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_native_int8(dtype: torch.dtype, library: NativeLibrary) -> None:
    check_int8(dtype, library)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_torch_int8(dtype: torch.dtype) -> None:
    check_int8(dtype, None)


def test_int8_is_close_to_the_unquantised_product() -> None:
    weight, x = torch.randn(64, 256), torch.randn(9, 256)
    result = int8_linear(weight, None, dtype=torch.float32, library=None)(quantize(x))
    expected = x.double() @ weight.double().T
    assert (result - expected).norm() / expected.norm() <= TO_UNQUANTISED


def test_native_int8_at_the_ends_of_its_range(library: NativeLibrary) -> None:
    """The largest sums of a group: 32 times the largest quant and value, refined too."""
    ones, outlier = torch.ones(1536), torch.ones(1536)
    outlier[32:64] = 1000.0
    weight = torch.stack((ones, -ones))
    weight[:, 1::2] *= 0.5
    x = quantize(torch.stack((ones, -ones, outlier, -outlier)))
    result = int8_linear(weight, None, dtype=torch.float32, library=library)(x)
    assert_close(result, product(x, quantize_weight(weight).dequantized(), None))


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q8_0], ids=lambda kind: str(kind.name))
def test_int8_keeps_the_values_of_ggufs_blocks(kind: Type) -> None:
    """Up to the precision of a float16 scale."""
    weight = torch.randn(9, 256)
    stored = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    error = (quantize_weight(stored).dequantized() - stored).norm() / stored.norm()
    assert error <= 1e-3


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(-15, 4), offset=st.floats(-3, 3), seed=st.integers(0, 100))
def test_int8_is_within_one_step(scale: float, offset: float, seed: int) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(3, 70) + offset) * 2**scale
    groups = quantize_weight(weight)
    error = (groups.dequantized()[:, :70] - weight).abs()
    steps = groups.scales.float().repeat_interleave(GROUP, dim=1)[:, :70]
    assert (error <= steps + 255 * SMALLEST_FLOAT16).all()


def panels_in_torch(weight: Tensor) -> Tensor:
    """What `quantized_panels` has to give."""
    groups = quantize_weight(weight)
    by_step = groups.quants.view(*groups.scales.shape, GROUP // 4, 4)
    return packed(by_step.flatten(2), groups.scales, groups.minima)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weights_are_quantised_as_in_torch(dtype: torch.dtype, library: NativeLibrary) -> None:
    """To the bit: around whole panels and groups, with large, small and equal weights."""
    for out_features, in_features in (*SHAPES, (17, 45), (1, 1), (200, 576)):
        weight = (
            torch.randn(out_features, in_features) * torch.logspace(-9, 4, out_features)[:, None]
        )
        weight[0] = 0
        weight[:, ::7] += 3
        weight[-1] = weight[-1, 0]
        weight = weight.to(dtype)
        assert torch.equal(quantized_panels(weight, library), panels_in_torch(weight))


@settings(max_examples=50)
@given(
    rows=st.lists(
        st.lists(st.floats(-65504, 65504, width=16), min_size=33, max_size=33),
        min_size=1,
        max_size=3,
    )
)
def test_any_weights_are_quantised_as_in_torch(rows: list[list[float]]) -> None:
    """On the fastest build: a fixture with parameters would repeat the examples."""
    library = native_library()
    weight = torch.tensor(rows) + 0.0  # a group of 0 and -0 has either for its minimum
    assert torch.equal(quantized_panels(weight, library), panels_in_torch(weight))


def test_damaged_weights_are_not_hidden(library: NativeLibrary) -> None:
    weight = torch.randn(16, 64)
    weight[3, 40] = torch.nan
    result = int8_linear(weight, None, dtype=torch.float32, library=library)(activations(1, 64))
    assert result[0].isnan().nonzero().flatten().tolist() == [3]


def test_channels_and_tokens_of_zeros(library: NativeLibrary) -> None:
    weight = torch.randn(3, 32)
    weight[1] = 0
    x = quantize(torch.tensor([[0.0] * 32, [1.0] * 32]))
    for result in (
        int8_linear(weight, None, dtype=torch.float32, library=library)(x),
        int8_linear(weight, None, dtype=torch.float32, library=None)(x),
    ):
        assert result[0].tolist() == [0, 0, 0]
        assert result[1, 1] == 0 and result[1, 0] != 0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_int4(dtype: torch.dtype, library: NativeLibrary) -> None:
    for out_features, in_features in SHAPES:
        blocks = random_blocks(out_features, in_features)
        for bias in (None, torch.randn(out_features)):
            linear = int4_linear(blocks, bias, dtype=dtype, library=library)
            for rows in ROWS:
                x = activations(rows, in_features)
                result = linear(x)
                assert (result.dtype, result.shape) == (dtype, (rows, out_features))
                assert_close(result, product(x, dequantized(blocks), bias))


def test_rows_do_not_depend_on_their_batch(library: NativeLibrary) -> None:
    linears: tuple[Linear, ...] = (
        int8_linear(torch.randn(51, 160), None, dtype=torch.float32, library=library),
        int4_linear(random_blocks(51, 160), None, dtype=torch.float32, library=library),
    )
    x = activations(33, 160)
    for linear in linears:
        together = linear(x)
        for row in range(33):
            alone = GroupedActivation(groups=x.groups[row : row + 1], num_features=x.num_features)
            assert torch.equal(linear(alone)[0], together[row])


def test_concatenated_blocks_give_outputs_behind_one_another(library: NativeLibrary) -> None:
    parts = [random_blocks(10, 64), random_blocks(7, 64)]
    x = activations(3, 64)
    fused = int4_linear(concatenated(parts), None, dtype=torch.float32, library=library)(x)
    expected = torch.cat([product(x, dequantized(part), None) for part in parts], dim=1)
    assert_close(fused, expected)


def test_what_they_refuse(library: NativeLibrary) -> None:
    int4 = int4_linear(random_blocks(7, 64), None, dtype=torch.float32, library=library)
    int8 = int8_linear(torch.ones(7, 64), None, dtype=torch.float32, library=library)
    in_torch = int8_linear(torch.ones(7, 64), None, dtype=torch.float32, library=None)
    for linear in (int4, int8, in_torch):
        assert linear.takes_quantized
        with pytest.raises(TypeError, match=r"see Ops\.quantize"):
            linear(torch.ones(1, 64))
        with pytest.raises(ValueError, match="x has 32 features; the matrix takes 64"):
            linear(quantize(torch.ones(1, 32)))


def test_memory(library: NativeLibrary) -> None:
    int8 = int8_linear(torch.ones(64, 320), None, dtype=torch.float32, library=library)
    int4 = int4_linear(random_blocks(64, 320), None, dtype=torch.float32, library=library)
    in_torch = int8_linear(torch.ones(64, 320), None, dtype=torch.float32, library=None)
    assert in_torch.num_bytes == 64 * 10 * 36  # 32 weights, a scale and a minimum a group
    assert int8.num_bytes == 64 * 10 * 36 + 4 * 64  # biases
    assert int4.num_bytes == 64 * 10 * 20 + 4 * 64  # Q4_1 takes 20 bytes a block
