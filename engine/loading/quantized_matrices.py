"""Matrices in W8A8 or W4A16: the numbers of a file where these have that form, or made here."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Checkpoint
from pagewire.engine.quantization import Quantization
from pagewire.kernels import w4a16, w8a8
from pagewire.kernels.experts import Experts
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

    @property
    def emulated(self) -> bool:
        return self._linears.emulated

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
        stored = self._stored(rows, in_features)
        if stored is not None and all(map(has_form, stored)):
            return self._linears.linear(stored, bias, self._dtype)
        if stored is not None:
            self._count_rounded_again(rows)
        return self._linears.linear([quantize_weight(weight(), self._numbers)], bias, self._dtype)

    def stored_linear(
        self, module: str, out_features: int, in_features: int, dtype: torch.dtype
    ) -> Linear | None:
        """A matrix whose results are of `dtype`, if the file has numbers of the right kind."""
        stored = self._stored({module: out_features}, in_features)
        if stored is None or not all(map(has_form, stored)):
            return None
        return self._linears.linear(stored, None, dtype)

    def experts(self, gate_up: Sequence[Linear], down: Sequence[Linear]) -> Experts | None:
        """As `QuantizedLinears.experts`."""
        return self._linears.experts(gate_up, down)

    def log(self) -> None:
        """Say what became of the file's numbers, once all matrices are made."""
        if self._num_rounded_again:
            logger.warning(
                "%d matrices that the files hold in 8 bits are rounded to 8 bits again: they have "
                "zeros, or a scale for each group or block, and kernels want one for each output",
                self._num_rounded_again,
            )

    def _stored(self, rows: Mapping[str, int], in_features: int) -> list[QuantizedMatrix] | None:
        """What the file holds, if all of it has the wanted numbers."""
        found = (self._read(module, (rows[module], in_features)) for module in rows)
        stored = [matrix for matrix in found if matrix is not None]
        return stored if len(stored) == len(rows) else None

    def _count_rounded_again(self, rows: Mapping[str, int]) -> None:
        """Raises ModelError where too much would be lost."""
        if self._numbers == w4a16.DTYPE:
            raise ModelError(
                f"of matrices {', '.join(rows)} some have groups that are no runs of "
                f"{w4a16.GROUP_SIZE} inputs or a multiple, and 4 bits rounded again would lose too "
                "much; choose quantization none, which runs what the numbers stand for"
            )
        self._num_rounded_again += len(rows)

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
