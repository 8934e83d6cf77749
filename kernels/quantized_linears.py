"""The seam between quantised matrices and the devices that multiply them."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pagewire.kernels import w4a16, w8a8
from pagewire.kernels.experts import Experts
from pagewire.kernels.ops import Linear
from pagewire.kernels.quantized_matrix import QuantizedMatrix


class QuantizedLinears(Protocol):
    """Makes matrices that one device multiplies in the forms of `w8a8` and `w4a16`."""

    @property
    def dtypes(self) -> Sequence[torch.dtype]:
        """Of the numbers of matrices that it makes: int8, float8_e4m3fn or, for 4 bits, uint8."""

    @property
    def expert_dtypes(self) -> Sequence[torch.dtype]:
        """Those of `dtypes` that matrices of experts may have."""

    @property
    def emulated(self) -> bool:
        """Whether they are slower than matrices in floating point."""

    def linear(
        self, matrices: Sequence[QuantizedMatrix], bias: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        """One matrix of those that lie below one another; its results are of `dtype`.

        All have numbers of one of `dtypes`, and `has_form` is true of each. bias: [out_features].
        """

    def experts(self, gate_up: Sequence[Linear], down: Sequence[Linear]) -> Experts | None:
        """All experts of a layer in one product, of what `linear` made; None: there is none."""


def has_form(matrix: QuantizedMatrix) -> bool:
    """Whether devices multiply the numbers of a matrix as they are."""
    if matrix.quants.dtype in w8a8.DTYPES:
        return w8a8.has_scale_per_output(matrix)
    return w4a16.has_whole_groups(matrix)


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> QuantizedMatrix:
    """Round a matrix to numbers of `dtype`, in a form that devices multiply.

    weight: floating point [out_features, in_features].
    """
    if dtype in w8a8.DTYPES:
        return w8a8.quantize_weight(weight, dtype)
    return w4a16.quantize_weight(weight)
