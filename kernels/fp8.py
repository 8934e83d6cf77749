"""Rows of numbers in fp8 with a scale each, of weights or of activations.

Values are e4m3 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022): 448 at most.
"""

import torch
from torch import Tensor

from pagewire.kernels.quantized_matrix import QuantizedMatrix, consecutive_groups

DTYPE = torch.float8_e4m3fn

_LARGEST = 448.0


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest magnitude is the largest fp8 number.

    x: floating point [num_rows, dim]. Returns fp8 [num_rows, dim] and float32 scales [num_rows, 1],
    1 for rows of 0.
    """
    x = x.float()
    scales = x.abs().amax(dim=-1, keepdim=True) / _LARGEST
    scales.masked_fill_(scales == 0, 1)
    # A quotient may round to more than the largest number, which would become NaN.
    return (x / scales).clamp_(-_LARGEST, _LARGEST).to(DTYPE), scales


def quantize_weight(weight: Tensor) -> QuantizedMatrix:
    """A scale for each output; weight: [out_features, in_features]."""
    quants, scales = quantize_rows(weight)
    group_of = consecutive_groups(weight.shape[1], None)
    return QuantizedMatrix(quants=quants, scales=scales, zeros=None, group_of=group_of)
