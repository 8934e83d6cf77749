"""The SwiGLU kernel against the float64 reference."""

import pytest
import torch
from paged_case import TOLERANCE, assert_close

from pagewire.kernels import reference
from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.silu_mul import silu_mul


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [24, 1100])  # a part of a tile, and more than one
def test_silu_mul(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(3, 2 * dim, dtype=dtype) * 5
    gate, up = gate_up.chunk(2, dim=1)
    assert_close(silu_mul(gate_up), reference.silu_mul(gate, up))


def test_rows_of_a_wider_tensor() -> None:
    gate_up = torch.randn(3, 40)
    assert torch.equal(silu_mul(gate_up[:, :32]), silu_mul(gate_up[:, :32].contiguous()))


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(KernelArgumentError, match="gate_up has 5 columns"):
        silu_mul(torch.randn(2, 5))
