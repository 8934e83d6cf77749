"""Activations in 8 bits: how they are made, and what they stand for, in plain torch.

The layout of a group is that of `ActivationGroup` in kernels/cpu/activation_group.h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pagewire.kernels.ops import GROUP, Activation, GroupedActivation

GROUP_BYTES = 2 * GROUP + 12  # values, remainders; unit and sum in float32; int32 refined

_REFINEMENT = 128  # steps of a remainder in one of a value
_REFINE_ABOVE = 2.0  # times the mean scale of a token


def num_groups(num_features: int) -> int:
    return -(-num_features // GROUP)


def quantize(x: Tensor) -> GroupedActivation:
    """x: [num_tokens, num_features]. Halves are rounded to even, NaN reaches the unit."""
    groups = _in_groups(x.float())
    scales = groups.abs().amax(dim=-1) / 127  # [num_tokens, num_groups]
    scales = scales.masked_fill(scales < torch.finfo(torch.float32).tiny, 0)
    inverses = torch.where(scales == 0, 0, scales.reciprocal())
    exact = groups * inverses[..., None]
    values = exact.round()
    limits = scales.double().sum(dim=1, keepdim=True) / scales.shape[1] * _REFINE_ABOVE
    refined = scales > limits
    remainders = ((exact - values) * _REFINEMENT).round() * refined[..., None]
    factors = torch.where(refined, _REFINEMENT, 1)  # units of a value
    units = scales / factors
    sums = (values * factors[..., None] + remainders).sum(dim=-1) * units
    parts = (
        values.to(torch.int8),
        remainders.to(torch.int8),
        units[..., None],
        sums[..., None],
        refined[..., None].to(torch.int32),
    )
    return GroupedActivation(
        groups=torch.cat([part.view(torch.uint8) for part in parts], dim=-1),
        num_features=x.shape[1],
    )


def dequantize(x: GroupedActivation) -> Tensor:
    """float32 [num_tokens, num_features]."""
    terms = x.groups[..., : 2 * GROUP].view(torch.int8).float()
    units = x.groups[..., 2 * GROUP : 2 * GROUP + 4].view(torch.float32)
    refined = x.groups[..., 2 * GROUP + 8 :].view(torch.int32)
    values, remainders = terms[..., :GROUP], terms[..., GROUP:]
    restored = torch.where(refined > 0, values * _REFINEMENT + remainders, values) * units
    return restored.flatten(1)[:, : x.num_features]


def as_quantized(x: Activation, num_features: int) -> GroupedActivation:
    """x as a quantised matrix with so many inputs takes it.

    Raises TypeError for another activation and ValueError for another number of features.
    """
    if not isinstance(x, GroupedActivation):
        raise TypeError("a quantised matrix takes a GroupedActivation; see Ops.quantize")
    if x.num_features != num_features:
        raise ValueError(f"x has {x.num_features} features; the matrix takes {num_features}")
    return x


def _in_groups(x: Tensor) -> Tensor:
    """[rows, num_features] to [rows, num_groups, GROUP], filled up with 0."""
    return F.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
