"""Matrices in floating point of every kernel, against the product in float64."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagewire.kernels.float_linear import FloatKernel, choose_float_kernel, float_linear
from pagewire.kernels.linear import DenseLinear
from pagewire.kernels.native_library import NativeLibrary
from pagewire.kernels.native_linear import NativeLinear, native_linear
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.onednn_linear import OneDnnLinear, has_onednn, onednn_linear
from pagewire.kernels.ops import Linear
from pagewire.kernels.select import SelectedOps
from pagewire.kernels.torch_ops import TorchOps

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
# Row counts around the tiles of the kernel and its blocks of rows, channels around its panels.
ROWS = (1, 2, 3, 4, 6, 7, 9, 13, 14, 15, 33)
SHAPES = ((32, 16), (64, 576), (51, 37), (1, 1), (300, 64))
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def check(linear: Linear, x: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    result = linear(x)
    assert (result.dtype, result.shape) == (dtype, expected.shape)
    error = (result.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
def test_native(dtype: torch.dtype, out_dtype: torch.dtype, library: NativeLibrary) -> None:
    for out_features, in_features in SHAPES:
        weight = torch.randn(out_features, in_features, dtype=dtype)
        for bias in (None, torch.randn(out_features, dtype=dtype)):
            linear = native_linear(weight, bias, out_dtype=out_dtype, library=library)
            for rows in ROWS:
                x = torch.randn(rows, in_features, dtype=dtype)
                expected = x.double() @ weight.double().T
                check(linear, x, expected if bias is None else expected + bias.double(), out_dtype)


def test_native_over_blocks_of_rows(library: NativeLibrary) -> None:
    weight, x = torch.randn(40, 1000), torch.randn(200, 1000)
    linear = native_linear(weight, None, out_dtype=torch.float32, library=library)
    check(linear, x, x.double() @ weight.double().T, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_a_row_is_the_same_in_every_batch(
    dtype: torch.dtype, library: NativeLibrary, cuts: list[int]
) -> None:
    # Deep enough that sums of many rows wait in memory between blocks of features.
    weight, x = torch.randn(51, 1300, dtype=dtype), torch.randn(sum(cuts), 1300, dtype=dtype)
    linear = native_linear(weight, torch.randn(51), out_dtype=dtype, library=library)
    assert torch.equal(torch.cat([linear(part) for part in torch.split(x, cuts)]), linear(x))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("rows", [1, 33, 200])
def test_threads_change_nothing(rows: int, library: NativeLibrary) -> None:
    linear = native_linear(torch.randn(700, 576), None, out_dtype=torch.float32, library=library)
    x = torch.randn(rows, 576)
    by_two = linear(x)
    torch.set_num_threads(1)
    assert torch.equal(linear(x), by_two)


def test_both_halves_of_a_bfloat16_are_kept_apart(library: NativeLibrary) -> None:
    weight = torch.eye(64, dtype=torch.bfloat16)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    linear = native_linear(weight, None, out_dtype=torch.bfloat16, library=library)
    assert torch.equal(linear(x), x)


def test_rows_that_do_not_lie_behind_one_another(library: NativeLibrary) -> None:
    weight, x = torch.randn(32, 16), torch.randn(3, 40)[:, 8:24]
    linear = native_linear(weight, None, out_dtype=torch.float32, library=library)
    assert torch.equal(linear(x), linear(x.clone()))


def test_no_rows(library: NativeLibrary) -> None:
    linear = native_linear(torch.ones(7, 4), None, out_dtype=torch.float32, library=library)
    assert linear(torch.empty(0, 4)).shape == (0, 7)


def test_what_native_refuses(library: NativeLibrary) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        native_linear(torch.ones(1, 1).half(), None, out_dtype=torch.float16, library=library)
    with pytest.raises(ValueError, match="have their dtype or float32"):
        native_linear(torch.ones(1, 1), None, out_dtype=torch.bfloat16, library=library)
    linear = native_linear(torch.ones(7, 64), None, out_dtype=torch.float32, library=library)
    with pytest.raises(ValueError, match=r"x has 32 features .* takes 64"):
        linear(torch.ones(1, 32))
    with pytest.raises(ValueError, match=r"bfloat16; the matrix takes 64 of torch\.float32"):
        linear(torch.ones(1, 64).bfloat16())
    with pytest.raises(TypeError, match="takes no quantised activation"):
        linear(TorchOps().quantize(torch.ones(1, 64)))


@needs_onednn
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_onednn(dtype: torch.dtype) -> None:
    for bias in (None, torch.randn(51, dtype=dtype)):
        weight = torch.randn(51, 37, dtype=dtype)
        linear = onednn_linear(weight, bias)
        for rows in (1, 9):
            x = torch.randn(rows, 37, dtype=dtype)
            expected = x.double() @ weight.double().T
            check(linear, x, expected if bias is None else expected + bias.double(), dtype)


@needs_onednn
def test_onednn_takes_floating_point() -> None:
    linear = onednn_linear(torch.ones(4, 4), None)
    assert not linear.takes_quantized
    with pytest.raises(TypeError, match="takes no quantised activation"):
        linear(TorchOps().quantize(torch.ones(1, 4)))


def test_memory(library: NativeLibrary) -> None:
    weight = torch.ones(51, 64, dtype=torch.bfloat16)
    native = native_linear(weight, None, out_dtype=torch.float32, library=library)
    assert native.num_bytes == 64 * 64 * 2 + 64 * 4  # two panels and their biases
    if has_onednn():
        assert onednn_linear(weight, torch.ones(51).bfloat16()).num_bytes >= 51 * 65 * 2


def selected(library: NativeLibrary | None, *, deterministic: bool = False) -> SelectedOps:
    ops = TorchOps() if library is None else NativeOps(library)
    return SelectedOps(ops=ops, library=library, deterministic=deterministic, explanation="")


@needs_onednn
def test_bfloat16_instructions_are_used_unless_results_must_be_deterministic(
    library: NativeLibrary,
) -> None:
    flags = frozenset({"avx512_bf16"})

    def choose(chosen: SelectedOps, dtype: torch.dtype, flags: frozenset[str]) -> FloatKernel:
        return choose_float_kernel(chosen, dtype, "cpu", flags=flags)

    assert choose(selected(library), torch.bfloat16, flags) is FloatKernel.ONEDNN
    assert choose(selected(None), torch.bfloat16, flags) is FloatKernel.ONEDNN
    assert choose(selected(library), torch.float32, flags) is FloatKernel.NATIVE
    assert choose(selected(library), torch.bfloat16, frozenset()) is FloatKernel.NATIVE
    exact = selected(library, deterministic=True)
    assert choose(exact, torch.bfloat16, flags) is FloatKernel.NATIVE


@pytest.mark.parametrize("device", ["cuda", "cpu"])  # the second: in Triton's interpreter
def test_without_the_library_triton_is_deterministic(device: str) -> None:
    flags = frozenset({"avx512_bf16"})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kernel = choose_float_kernel(selected(None, deterministic=True), dtype, device, flags=flags)
        assert kernel is FloatKernel.TRITON


def test_torch_is_what_is_left(library: NativeLibrary) -> None:
    no_flags = frozenset[str]()
    for chosen, dtype, device in (
        (selected(None), torch.float32, "cpu"),
        (selected(library), torch.float16, "cpu"),
        (selected(library), torch.bfloat16, "cuda"),
    ):
        kernel = choose_float_kernel(chosen, dtype, device, flags=no_flags)
        assert kernel is FloatKernel.TORCH


@needs_onednn
def test_a_matrix_for_each_kernel(library: NativeLibrary) -> None:
    kinds = {
        kernel: type(
            float_linear(
                torch.ones(4, 4), None, kernel=kernel, library=library, out_dtype=torch.float32
            )
        )
        for kernel in FloatKernel
        if kernel is not FloatKernel.TRITON  # which is not there on every platform
    }
    assert kinds == {
        FloatKernel.NATIVE: NativeLinear,
        FloatKernel.ONEDNN: OneDnnLinear,
        FloatKernel.TORCH: DenseLinear,
    }
