"""From the tensors of a checkpoint to matrices that multiply: dense, in 8 bits or in 4.

Every tensor is converted straight into its place in a fused matrix, one after another, so that
loading takes little more memory than the model.
"""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Checkpoint, Storage
from pagewire.engine.quantization import Quantization
from pagewire.kernels.int4_linear import concatenated, int4_linear
from pagewire.kernels.int8_linear import int8_linear
from pagewire.kernels.linear import DenseLinear
from pagewire.kernels.native_library import NativeLibrary, NativeLibraryError, find_library
from pagewire.kernels.ops import Linear

logger = logging.getLogger(__name__)


class LinearLoader:
    """Reads tensors and matrices of one checkpoint for one device, dtype and quantization.

    Raises ModelError for a quantization that the device does not have.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: str,
        quantization: Quantization,
    ) -> None:
        if quantization is not Quantization.NONE and device != "cpu":
            raise ModelError(f"quantization {quantization} needs device cpu; this is {device}")
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._quantization = quantization
        self._library = _library(quantization)
        self._num_int4 = 0

    def tensor(self, name: str, *shape: int) -> Tensor:
        """One tensor in the loader's dtype."""
        tensor = self._empty(*shape)
        self._checkpoint.read(name, tensor)
        return tensor

    def linear(self, rows: Mapping[str, int], in_features: int, *, bias: bool = False) -> Linear:
        """The modules of `rows`, each with so many outputs, as one matrix."""
        biases = self._fused(rows, "bias") if bias else None
        storage = self._storage(rows)
        if storage is Storage.INT4:
            return self._int4(rows, biases)
        weight = self._fused(rows, "weight", in_features)
        return (
            self._dense(weight, biases) if storage is Storage.FLOAT else self._int8(weight, biases)
        )

    def tied(self, module: str, embedding: Tensor) -> Linear:
        """The LM head that is the embedding: the same memory unless it is quantised."""
        storage = self._storage([module])
        if storage is Storage.INT4:
            return self._int4([module], None)
        return (
            self._dense(embedding, None)
            if storage is Storage.FLOAT
            else self._int8(embedding, None)
        )

    def check_used(self) -> None:
        """Raises ModelError when int4 was asked for and no matrix of the checkpoint has 4 bits."""
        if self._quantization is Quantization.INT4 and not self._num_int4:
            raise ModelError(
                "quantization int4 runs the 4-bit blocks of a GGUF file of type Q4_0 or Q4_1, and "
                "this model has none; choose such a file, or quantization int8"
            )

    def _storage(self, modules: Iterable[str]) -> Storage:
        """How the matrix of these modules is kept in memory."""
        if self._quantization is Quantization.NONE:
            return Storage.FLOAT
        if self._quantization is Quantization.INT8:
            return Storage.QUANTIZED
        kinds = {self._checkpoint.storage(f"{module}.weight") for module in modules}
        if len(kinds) == 1:
            return kinds.pop()
        return Storage.FLOAT if Storage.FLOAT in kinds else Storage.QUANTIZED

    def _int4(self, modules: Iterable[str], bias: Tensor | None) -> Linear:
        assert self._library is not None  # int4 has one: see _library
        self._num_int4 += 1
        parts = [self._checkpoint.read_int4(f"{module}.weight") for module in modules]
        return int4_linear(concatenated(parts), bias, dtype=self._dtype, library=self._library)

    def _int8(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return int8_linear(weight, bias, dtype=self._dtype, library=self._library)

    def _dense(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return DenseLinear(weight=weight, bias=bias)

    def _fused(self, rows: Mapping[str, int], kind: str, *columns: int) -> Tensor:
        """The tensors of `rows` below one another: [sum of rows, *columns]."""
        fused = self._empty(sum(rows.values()), *columns)
        for module, into in zip(rows, torch.split(fused, list(rows.values())), strict=True):
            self._checkpoint.read(f"{module}.{kind}", into)
        return fused

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)


def _library(quantization: Quantization) -> NativeLibrary | None:
    """The C++ kernels. None, which is said in the log, where int8 has to run in torch.

    Raises ModelError where int4 lacks them: nothing else multiplies its blocks.
    """
    if quantization is Quantization.NONE:
        return None
    try:
        return find_library()
    except NativeLibraryError as error:
        if quantization is Quantization.INT4:
            raise ModelError(f"quantization int4 needs the C++ kernels: {error}") from error
        logger.warning("int8 matrices run in torch, more slowly: %s", error)
        return None
