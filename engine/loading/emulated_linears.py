"""Matrices in fp8 or W4A16 where no kernel multiplies them: as a file holds them, or made here."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Checkpoint
from pagewire.engine.quantization import Quantization
from pagewire.kernels import fp8, w4a16
from pagewire.kernels.emulated_linear import EmulatedLinear
from pagewire.kernels.ops import Linear
from pagewire.kernels.quantized_matrix import QuantizedMatrix

EMULATED = (Quantization.FP8, Quantization.W4A16)


class EmulatedLinears:
    """Makes the matrices of a checkpoint for one of EMULATED."""

    def __init__(
        self, checkpoint: Checkpoint, quantization: Quantization, dtype: torch.dtype
    ) -> None:
        """`dtype`: of results."""
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._fp8 = quantization is Quantization.FP8

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
        stored = [self._stored(module, (rows[module], in_features)) for module in rows]
        matrices = [matrix for matrix in stored if matrix is not None]
        if len(matrices) < len(rows):
            quantize = fp8.quantize_weight if self._fp8 else w4a16.quantize_weight
            matrices = [quantize(weight())]
        return EmulatedLinear(
            matrices=tuple(matrices), bias=bias, dtype=self._dtype, fp8_activations=self._fp8
        )

    def _stored(self, module: str, shape: tuple[int, int]) -> QuantizedMatrix | None:
        """What the file holds, of the kind that is wanted."""
        matrix = self._checkpoint.read_quantized(f"{module}.weight")
        if matrix is None or matrix.quants.dtype != (fp8.DTYPE if self._fp8 else w4a16.DTYPE):
            return None
        if matrix.quants.shape != shape:
            raise ModelError(
                f"matrix {module} has shape {list(matrix.quants.shape)}, but the model's "
                f"configuration asks for {list(shape)}"
            )
        return matrix
