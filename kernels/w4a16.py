"""Weights in 4 bits with a scale and a zero for each group of inputs, rounded to the nearest.

The numbers are those of GPTQ (Frantar et al., 2022) and AWQ (Lin et al., 2023), whose tools choose
them better: they look at activations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pagewire.kernels.quantized_matrix import QuantizedMatrix, consecutive_groups

DTYPE = torch.uint8
GROUP_SIZE = 128

_LEVELS = 15


def quantize_weight(weight: Tensor) -> QuantizedMatrix:
    """Round each weight to one of 16 levels between the smallest and the largest of its group.

    0 is one of the levels. weight: floating point [out_features, in_features].
    """
    out_features, in_features = weight.shape
    padded = F.pad(weight.float(), (0, -in_features % GROUP_SIZE))
    groups = padded.view(out_features, -1, GROUP_SIZE)
    low, high = groups.aminmax(dim=-1)  # [out_features, num_groups]
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = ((high - low) / _LEVELS).half()
    steps = scales.float().masked_fill(scales == 0, 1)
    zeros = (-low / steps).round_().clamp_(0, _LEVELS)
    quants = (groups / steps[..., None]).round_().add_(zeros[..., None]).clamp_(0, _LEVELS)
    return QuantizedMatrix(
        quants=quants.to(DTYPE).flatten(1)[:, :in_features],
        scales=scales,
        zeros=zeros.to(DTYPE),
        group_of=consecutive_groups(in_features, GROUP_SIZE),
    )


def has_whole_groups(matrix: QuantizedMatrix) -> bool:
    """Whether every run of GROUP_SIZE inputs of a matrix in 4 bits has one scale and one zero.

    Groups of a multiple of that, too; the last run may be shorter.
    """
    firsts = matrix.group_of[::GROUP_SIZE]
    runs = firsts.repeat_interleave(GROUP_SIZE)[: len(matrix.group_of)]
    return torch.equal(matrix.group_of, runs)
