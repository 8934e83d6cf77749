"""A quantised matrix as checkpoints describe it: small numbers, and what they stand for.

One form for all file formats. What multiplies a matrix packs it in its own way from here.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pagewire.kernels.int4_linear import Int4Blocks
from pagewire.kernels.ops import GROUP


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedMatrix:
    """weight = (quant - zero) * scale, with a scale and a zero for each group of input features.

    Raises ValueError where the shapes do not fit.
    """

    quants: Tensor  # [out_features, in_features]: uint8 0 to 15 for 4 bits, int8 or float8_e4m3fn
    scales: Tensor  # floating point [out_features, num_groups]
    zeros: Tensor | None  # integers [out_features, num_groups]; None: 0
    group_of: Tensor  # int64 [in_features]: the group of each input feature

    def __post_init__(self) -> None:
        out_features, in_features = self.quants.shape
        num_groups = self.scales.shape[-1]
        grouped = [out_features, num_groups]
        for name, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tensor is not None and list(tensor.shape) != grouped:
                raise ValueError(
                    f"{name} have shape {list(tensor.shape)}; the weights need {grouped}"
                )
        if list(self.group_of.shape) != [in_features]:
            raise ValueError(
                f"groups of {list(self.group_of.shape)} features for {in_features} features"
            )
        low, high = self.group_of.aminmax()
        if low < 0 or high >= num_groups:
            raise ValueError(f"groups are {int(low)} to {int(high)}, with {num_groups} scales each")

    @property
    def num_bytes(self) -> int:
        parts = (self.quants, self.scales, self.zeros, self.group_of)
        return sum(part.nbytes for part in parts if part is not None)

    def dequantized(self) -> Tensor:
        """float32 [out_features, in_features]."""
        values = self.quants.float()
        if self.zeros is not None:
            values -= self.zeros.float()[:, self.group_of]
        return values.mul_(self.scales.float()[:, self.group_of])

    def rows(self, outputs: range) -> "QuantizedMatrix":
        """Some neighbouring outputs, in the same memory."""
        index = slice(outputs.start, outputs.stop)
        return replace(
            self,
            quants=self.quants[index],
            scales=self.scales[index],
            zeros=None if self.zeros is None else self.zeros[index],
        )

    def columns(self, inputs: range) -> "QuantizedMatrix":
        """Some neighbouring input features, in the same memory."""
        index = slice(inputs.start, inputs.stop)
        return replace(self, quants=self.quants[:, index], group_of=self.group_of[index])

    def int4_blocks(self) -> Int4Blocks:
        """The same weights in blocks of 32 of one scale, whose minimum is -zero scales in float16.

        Raises ValueError unless they have 4 bits and groups are runs of whole blocks.
        """
        out_features, in_features = self.quants.shape
        if self.quants.dtype != torch.uint8 or in_features % GROUP:
            raise ValueError(f"weights of {self.quants.dtype} are no 4-bit blocks of {GROUP}")
        block_groups = self.group_of.view(-1, GROUP)
        if not torch.equal(block_groups, block_groups[:, :1].expand_as(block_groups)):
            raise ValueError(f"groups are no runs of {GROUP} input features")
        groups = block_groups[:, 0]
        scales = self.scales[:, groups]
        zeros = torch.zeros_like(scales) if self.zeros is None else self.zeros[:, groups]
        low, high = self.quants.view(out_features, -1, 2, GROUP // 2).unbind(2)
        return Int4Blocks(
            quants=low | high << 4,
            scales=scales.half(),
            minima=(scales.float() * -zeros.float()).half(),
        )


def consecutive_groups(in_features: int, group_size: int | None) -> Tensor:
    """int64 [in_features]: the groups of runs of `group_size` features, None for one group."""
    return torch.arange(in_features) // (group_size or in_features)
