"""Products with a matrix in 4 bits against float64."""

import pytest
import torch
from paged_case import assert_close
from torch import Tensor

from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.w4a16_matmul import GROUP, pack_int4, w4a16_matmul


def quantized_matrix(
    num_outputs: int, num_inputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Quants [num_outputs, num_inputs], scales and zeros [num_groups, num_outputs]."""
    num_groups = -(-num_inputs // GROUP)
    quants = torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.uint8)
    scales = (torch.rand(num_groups, num_outputs) / 8).to(dtype)
    zeros = torch.randint(0, 16, (num_groups, num_outputs), dtype=torch.uint8)
    return quants, scales, zeros


def restored(quants: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """float64 [num_outputs, num_inputs]."""
    group_of = torch.arange(quants.shape[1]) // GROUP
    return (quants.double() - zeros.T.double()[:, group_of]) * scales.T.double()[:, group_of]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    # One tile of each size and several, of which the last are not full; groups neither.
    [
        ((3, 40, 256), torch.float32),
        ((2, 16, 140), torch.float32),
        ((17, 16, 210), torch.bfloat16),
        ((1, 33, 384), torch.bfloat16),
        ((60, 130, 128), torch.float16),
        ((150, 100, 256), torch.bfloat16),
    ],
    ids=str,
)
def test_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_tokens, num_outputs, num_inputs = shape
    x = torch.randn(num_tokens, num_inputs).to(dtype)
    quants, scales, zeros = quantized_matrix(num_outputs, num_inputs, dtype)
    out = w4a16_matmul(x, pack_int4(quants), scales, zeros)
    assert_close(out, x.double() @ restored(quants, scales, zeros).T)


def test_packing_keeps_every_quant() -> None:
    """Halves of a byte are 64 inputs apart."""
    quants = torch.arange(2 * GROUP, dtype=torch.uint8)[None] % 16
    quants[0, 64:128] = 15 - quants[0, 64:128]
    packed = pack_int4(quants)
    assert packed.shape == (1, GROUP)
    assert packed[0, :3].tolist() == [0 + 16 * 15, 1 + 16 * 14, 2 + 16 * 13]
    assert packed[0, 64:67].tolist() == [0, 17, 34]


def test_what_does_not_fit_is_refused() -> None:
    quants, scales, zeros = quantized_matrix(8, GROUP, torch.float32)
    x, weight = torch.zeros(2, GROUP), pack_int4(quants)
    with pytest.raises(KernelArgumentError, match=r"weight is \[8, 64\]; give \[any, 128\]"):
        w4a16_matmul(torch.zeros(2, GROUP + 1), weight, scales, zeros)
    with pytest.raises(KernelArgumentError, match=r"scales is torch\.float64"):
        w4a16_matmul(x, weight, scales.double(), zeros)
    with pytest.raises(KernelArgumentError, match=r"zeros is \[8, 1\]; give \[1, 8\]"):
        w4a16_matmul(x, weight, scales, zeros.T.contiguous())
