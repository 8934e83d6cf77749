"""Every way to store a matrix, against the product in float64."""

import pytest
import torch

from pagewire.kernels.linear import DenseLinear
from pagewire.kernels.torch_ops import TorchOps

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dense(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((5, 48), (32, 48), (32,)))
    product = x.double() @ weight.double().T
    for expected, linear in (
        (product, DenseLinear(weight=weight)),
        (product + bias.double(), DenseLinear(weight=weight, bias=bias)),
    ):
        result = linear(x)
        assert result.dtype == dtype
        assert (result.double() - expected).norm() / expected.norm() <= TOLERANCE[dtype]


def test_dense_takes_floating_point() -> None:
    linear = DenseLinear(weight=torch.ones(4, 4))
    assert not linear.takes_quantized
    with pytest.raises(TypeError, match="takes no quantised activation"):
        linear(TorchOps().quantize(torch.ones(1, 4)))
