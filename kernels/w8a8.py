"""W8A8 as GPUs multiply it: a scale for each output of a matrix and for each token of activations.

Numbers are int8 (Dettmers et al., "LLM.int8()", 2022) or e4m3 (Micikevicius et al., "FP8 Formats
for Deep Learning", 2022), rounded to the nearest.
"""

import torch
from torch import Tensor

from pagewire.kernels.kv_pool import QUANTIZED, quantize_vectors
from pagewire.kernels.quantized_matrix import QuantizedMatrix, consecutive_groups

FP8 = torch.float8_e4m3fn
DTYPES = tuple(QUANTIZED)  # int8 and FP8


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest magnitude is the largest number of `dtype`.

    x: floating point [num_rows, dim]; dtype: one of DTYPES. Returns [num_rows, dim] of it and
    float32 scales [num_rows], 1 for rows of 0.
    """
    return quantize_vectors(x.float(), dtype)


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> QuantizedMatrix:
    """weight: floating point [out_features, in_features]; dtype: one of DTYPES."""
    quants, scales = quantize_rows(weight, dtype)
    group_of = consecutive_groups(weight.shape[1], None)
    return QuantizedMatrix(quants=quants, scales=scales[:, None], zeros=None, group_of=group_of)


def has_scale_per_output(matrix: QuantizedMatrix) -> bool:
    """Whether a matrix of one of DTYPES has this form: one group of inputs, and no zeros but 0."""
    return matrix.scales.shape[1] == 1 and (matrix.zeros is None or not bool(matrix.zeros.any()))
