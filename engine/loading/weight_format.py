"""The seam between the quantised matrices of safetensors files and the many ways to pack them."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from pagewire.engine.config_fields import Fields
from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Storage
from pagewire.engine.loading.stored_tensor import StoredTensor
from pagewire.kernels.ops import GROUP
from pagewire.kernels.quantized_matrix import QuantizedMatrix

FLOATS = ("F32", "F16", "BF16")  # of scales, and of matrices that are not quantised


class WeightFormat(Protocol):
    """One way to pack matrices, for the tensors of one checkpoint."""

    @property
    def title(self) -> str:
        """For people."""

    def storage(self, module: str) -> Storage:
        """How the matrix of a module is held; FLOAT for one that is not quantised."""

    def matrix(self, module: str) -> QuantizedMatrix:
        """The matrix of a module that is quantised, on the CPU.

        Raises ModelError when a tensor is missing or of another type, ValueError when shapes do not
        fit.
        """


def read(tensors: Mapping[str, StoredTensor], name: str, *dtypes: str) -> Tensor:
    """One tensor of a checkpoint, of one of these types as safetensors calls them.

    Raises ModelError when it is missing or of another type.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise ModelError(f"there is no tensor {name}")
    if tensor.dtype not in dtypes:
        raise ModelError(
            f"tensor {name} is of type {tensor.dtype}; supported are {', '.join(dtypes)}"
        )
    return tensor.read()


def read_group_size(fields: Fields) -> int | None:
    """Input features with one scale; None, -1 in the file, for all of an output.

    Raises ModelError.
    """
    size = fields.integer("group_size")
    if size < 1 and size != -1:
        raise ModelError(f"group_size is {size}; it must be at least 1, or -1")
    return None if size == -1 else size


def storage_of_4_bits(group_size: int | None) -> Storage:
    """INT4 where groups are whole blocks as the kernels take them."""
    return Storage.INT4 if group_size is None or group_size % GROUP == 0 else Storage.QUANTIZED
