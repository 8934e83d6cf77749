"""The norm kernels against the float64 reference."""

import pytest
import torch
from paged_case import TOLERANCE, assert_close

from pagewire.kernels import reference
from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.rms_norm import add_rms_norm, rms_norm


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [16, 48])
def test_rms_norm(dim: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, dim, dtype=dtype) * 30, torch.randn(dim, dtype=dtype)
    assert_close(rms_norm(x, weight, 0.1), reference.rms_norm(x, weight, 0.1))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_of_heads_that_are_a_part_of_a_tensor(dtype: torch.dtype) -> None:
    heads = torch.randn(4, 5, 16, dtype=dtype)[1:, 1:4]
    weight = torch.randn(16, dtype=dtype)
    assert_close(rms_norm(heads, weight, 1e-5), reference.rms_norm(heads, weight, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 5, 48, dtype=dtype)
    weight, expected = torch.randn(48, dtype=dtype), x + residual
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected)
    assert_close(normed, reference.rms_norm(expected, weight, 1e-5))


def test_no_rows() -> None:
    assert rms_norm(torch.empty(0, 16), torch.ones(16), 1e-5).shape == (0, 16)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(4, 16), torch.randn(16)
    with pytest.raises(KernelArgumentError, match=r"x torch\.float32, weight torch\.float16"):
        rms_norm(x, weight.half(), 1e-5)
    with pytest.raises(KernelArgumentError, match=r"weight is \[16\]; give \[8\]"):
        rms_norm(x[:, :8], weight, 1e-5)
    with pytest.raises(KernelArgumentError, match="the last dimension of x has stride 2"):
        rms_norm(x[:, ::2], weight[:8], 1e-5)
    with pytest.raises(KernelArgumentError, match="residual is not contiguous"):
        add_rms_norm(x, torch.randn(16, 4).T, weight, 1e-5)
