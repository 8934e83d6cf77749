"""Matrices in 8 and 4 bits against the float64 product of what they stand for."""

import platform

import pytest
import torch
from torch import Tensor

from pagewire.kernels.cpu_flags import cpu_flags
from pagewire.kernels.instruction_sets import runnable_sets
from pagewire.kernels.int4_linear import BLOCK, Int4Blocks, Int4Linear, concatenated, int4_linear
from pagewire.kernels.int8_linear import int8_linear, quantize_weight
from pagewire.kernels.native_library import NativeLibrary, NativeLibraryError, load_library
from pagewire.kernels.ops import Linear, QuantizedActivation
from pagewire.kernels.torch_ops import TorchOps

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
TO_UNQUANTISED = 2e-2  # 8 bits of weights and of activations
RUNNABLE = runnable_sets(platform.machine(), cpu_flags())
# Row counts around the tiles of the kernels, output channels around their panels.
ROWS = (1, 2, 3, 7, 8, 9, 33)
SHAPES = ((16, 32), (48, 96), (51, 64), (7, 160))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=RUNNABLE, ids=lambda each: str(each.name))
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    """Each build that this CPU can run."""
    try:
        return load_library(request.param)
    except NativeLibraryError as error:
        pytest.skip(str(error))


def random_blocks(out_features: int, in_features: int) -> Int4Blocks:
    shape = (out_features, in_features // BLOCK)
    return Int4Blocks(
        quants=torch.randint(256, (*shape, BLOCK // 2), dtype=torch.uint8),
        scales=torch.rand(shape).half(),
        minima=-8 * torch.rand(shape).half(),
    )


def dequantized(blocks: Int4Blocks) -> Tensor:
    quants = torch.cat((blocks.quants & 15, blocks.quants >> 4), dim=2).double()
    values = quants * blocks.scales.double()[..., None] + blocks.minima.double()[..., None]
    return values.flatten(1)


def product(x: QuantizedActivation, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = (x.values.double() @ weight.T) * x.scales.double()[:, None]
    return out if bias is None else out + bias.double()


def assert_close(value: Tensor, expected: Tensor) -> None:
    error = (value.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[value.dtype], error


def check_int8(dtype: torch.dtype, library: NativeLibrary | None) -> None:
    for out_features, in_features in SHAPES:
        weight = torch.randn(out_features, in_features)
        values, scales = quantize_weight(weight)
        exact = values.double() * scales.double()[:, None]
        for bias in (None, torch.randn(out_features)):
            linear = int8_linear(weight, bias, dtype=dtype, library=library)
            for rows in ROWS:
                x = TorchOps().quantize(torch.randn(rows, in_features))
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
    result = int8_linear(weight, None, dtype=torch.float32, library=None)(TorchOps().quantize(x))
    expected = x.double() @ weight.double().T
    assert (result - expected).norm() / expected.norm() <= TO_UNQUANTISED


def test_native_int8_at_the_ends_of_its_range(library: NativeLibrary) -> None:
    weight = torch.tensor([[1.0] * 1536, [-1.0] * 1536])
    x = TorchOps().quantize(torch.tensor([[1.0] * 1536, [-1.0] * 1536]))
    result = int8_linear(weight, None, dtype=torch.float32, library=library)(x)
    assert_close(result, torch.tensor([[1536.0, -1536.0], [-1536.0, 1536.0]]))


def test_channels_and_tokens_of_zeros(library: NativeLibrary) -> None:
    weight = torch.randn(3, 32)
    weight[1] = 0
    x = TorchOps().quantize(torch.tensor([[0.0] * 32, [1.0] * 32]))
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
                x = TorchOps().quantize(torch.randn(rows, in_features))
                result = linear(x)
                assert (result.dtype, result.shape) == (dtype, (rows, out_features))
                assert_close(result, product(x, dequantized(blocks), bias))


def test_rows_do_not_depend_on_their_batch(library: NativeLibrary) -> None:
    linears: tuple[Linear, ...] = (
        int8_linear(torch.randn(51, 160), None, dtype=torch.float32, library=library),
        int4_linear(random_blocks(51, 160), None, dtype=torch.float32, library=library),
    )
    x = TorchOps().quantize(torch.randn(33, 160))
    for linear in linears:
        together = linear(x)
        for row in range(33):
            alone = QuantizedActivation(
                values=x.values[row : row + 1], scales=x.scales[row : row + 1]
            )
            assert torch.equal(linear(alone)[0], together[row])


def test_concatenated_blocks_give_outputs_behind_one_another(library: NativeLibrary) -> None:
    parts = [random_blocks(10, 64), random_blocks(7, 64)]
    x = TorchOps().quantize(torch.randn(3, 64))
    fused = int4_linear(concatenated(parts), None, dtype=torch.float32, library=library)(x)
    expected = torch.cat([product(x, dequantized(part), None) for part in parts], dim=1)
    assert_close(fused, expected)


def test_what_they_refuse(library: NativeLibrary) -> None:
    int4: Int4Linear = int4_linear(random_blocks(7, 64), None, dtype=torch.float32, library=library)
    int8 = int8_linear(torch.ones(7, 64), None, dtype=torch.float32, library=library)
    for linear in (int4, int8):
        assert linear.takes_quantized
        with pytest.raises(TypeError, match=r"see Ops\.quantize"):
            linear(torch.ones(1, 64))
        with pytest.raises(ValueError, match="x has 32 features; the matrix takes 64"):
            linear(TorchOps().quantize(torch.ones(1, 32)))
    with pytest.raises(ValueError, match="in_features is 30; it must be a multiple of 4"):
        int8_linear(torch.ones(7, 30), None, dtype=torch.float32, library=library)


def test_memory(library: NativeLibrary) -> None:
    int8 = int8_linear(torch.ones(64, 320), None, dtype=torch.float32, library=library)
    int4 = int4_linear(random_blocks(64, 320), None, dtype=torch.float32, library=library)
    assert int8.num_bytes == 64 * 320 + 2 * 4 * 64  # scales and biases
    assert int4.num_bytes == 64 * 10 * 20 + 4 * 64  # Q4_1 takes 20 bytes a block
