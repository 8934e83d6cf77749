"""Matrices in W8A8 or W4A16: the numbers of a file where these have that form, or made here."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Checkpoint
from pagewire.engine.quantization import Quantization
from pagewire.kernels import w4a16, w8a8
from pagewire.kernels.ops import Linear
from pagewire.kernels.quantized_linears import QuantizedLinears, has_form, quantize_weight
from pagewire.kernels.quantized_matrix import QuantizedMatrix

# The dtype of the numbers of a matrix.
NUMBERS = {
    Quantization.INT8: torch.int8,
    Quantization.FP8: w8a8.FP8,
    Quantization.W4A16: w4a16.DTYPE,
}

logger = logging.getLogger(__name__)


class QuantizedMatrices:
    """Makes the matrices of a checkpoint, their numbers of one dtype."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        linears: QuantizedLinears,
        numbers: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        """`numbers`: one that `linears` has; `dtype`: of what the model computes."""
        self._checkpoint = checkpoint
        self._linears = linears
        self._numbers = numbers
        self._dtype = dtype
        self._num_rounded_again = 0

    def linear(
        self,
        rows: Mapping[str, int],
        in_features: int,
        bias: Tensor | None,
        weight: Callable[[], Tensor],
    ) -> Linear:
        """The modules of `rows`, each with so many outputs, as one matrix.

        It has the numbers of the file where those of all modules are of the right kind, otherwise
        `weight()`, [out_features, in_features], is quantised. Raises ModelError.
        """
        matrices = self._stored(rows, in_features)
        if matrices is None:
            matrices = [quantize_weight(weight(), self._numbers)]
        return self._linears.linear(matrices, bias, self._dtype)

    def stored_linear(
        self, module: str, out_features: int, in_features: int, dtype: torch.dtype
    ) -> Linear | None:
        """A matrix whose results are of `dtype`, if the file has such numbers for it."""
        matrices = self._stored({module: out_features}, in_features)
        return None if matrices is None else self._linears.linear(matrices, None, dtype)

    def log(self) -> None:
        """Say what became of the file's numbers, once all matrices are made."""
        if self._num_rounded_again:
            logger.warning(
                "%d matrices that the files hold in 8 bits are rounded to 8 bits again: they have "
                "a scale for each group or block, where kernels want one for each output",
                self._num_rounded_again,
            )

    def _stored(self, rows: Mapping[str, int], in_features: int) -> list[QuantizedMatrix] | None:
        """What the file holds, if all of it has the wanted numbers and their form."""
        stored = [self._read(module, (rows[module], in_features)) for module in rows]
        matrices = [matrix for matrix in stored if matrix is not None]
        if len(matrices) < len(rows):
            return None
        if all(has_form(matrix) for matrix in matrices):
            return matrices
        if self._numbers == w4a16.DTYPE:
            raise ModelError(
                f"of matrices {', '.join(rows)} some have groups that are no runs of "
                f"{w4a16.GROUP_SIZE} inputs or a multiple, and 4 bits rounded again would lose too "
                "much; choose quantization none, which runs what the numbers stand for"
            )
        self._num_rounded_again += len(matrices)
        return None

    def _read(self, module: str, shape: tuple[int, int]) -> QuantizedMatrix | None:
        matrix = self._checkpoint.read_quantized(f"{module}.weight")
        if matrix is None or matrix.quants.dtype != self._numbers:
            return None
        if matrix.quants.shape != shape:
            raise ModelError(
                f"matrix {module} has shape {list(matrix.quants.shape)}, but the model's "
                f"configuration asks for {list(shape)}"
            )
        return matrix
