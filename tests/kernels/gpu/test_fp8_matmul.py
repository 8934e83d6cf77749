"""What the product in float8 by cuBLAS refuses. Its results need a GPU."""

import pytest
import torch

from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.fp8_matmul import fp8_matmul


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


def test_a_cpu_is_refused_with_the_remedy() -> None:
    with pytest.raises(KernelArgumentError, match="x is on cpu; move it to CUDA, or use w8a8"):
        fp8_matmul(ones(2, 32), torch.ones(2), ones(16, 32), torch.ones(16))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelArgumentError, match=r"\[16, 24\]; give multiples of 16"):
        fp8_matmul(ones(2, 24), torch.ones(2), ones(16, 24), torch.ones(16))
    with pytest.raises(KernelArgumentError, match=r"x is torch\.float32"):
        fp8_matmul(torch.ones(2, 32), torch.ones(2), ones(16, 32), torch.ones(16))


@pytest.mark.gpu
def test_product() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(20, 64, device="cuda"), torch.randn(48, 64, device="cuda")
    x8, weight8 = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    x_scales, weight_scales = torch.rand(20, device="cuda"), torch.rand(48, device="cuda")
    out = fp8_matmul(x8, x_scales, weight8, weight_scales).double()
    expected = x8.double() @ weight8.double().T * x_scales[:, None] * weight_scales
    assert (out - expected).norm() <= 4e-3 * expected.norm()
