"""The seam between a model's file format and its weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from pagewire.engine.config import ModelConfig
from pagewire.kernels.int4_linear import Int4Blocks
from pagewire.kernels.quantized_matrix import QuantizedMatrix


class Storage(Enum):
    """How a file holds a tensor."""

    FLOAT = "floating point"
    INT4 = "4-bit blocks of 32"  # Q4_0, Q4_1, or larger groups of whole blocks
    QUANTIZED = "quantised in another way"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Neighbouring rows or columns of a tensor: what one rank of several reads of it."""

    dim: int  # 0: rows, 1: columns
    index: range  # of them, in the whole tensor
    size: int  # how many the whole tensor has

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the tensor whose part has `shape`. The two agree where `index` is in range."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a whole tensor, a view."""
        return tensor.narrow(self.dim, self.index.start, len(self.index))


class Checkpoint(Protocol):
    """An open model on disk, with its tensors by their Hugging Face names."""

    config: ModelConfig

    @property
    def quantized_as(self) -> str | None:
        """For people: how the file holds matrices, where that is a choice of its maker."""

    def read(self, name: str, into: Tensor, part: Part | None = None) -> None:
        """Convert one tensor, or a part of it, to the dtype of `into` and write it there.

        A part of q or k is whole heads. Raises ModelError when the tensor is missing or its shape
        is not that of `into`.
        """

    def storage(self, name: str) -> Storage:
        """How the file holds a tensor. Raises ModelError when it is missing."""

    def read_int4(self, name: str, part: Part | None = None) -> Int4Blocks:
        """The blocks of a matrix whose storage is INT4, or of whole blocks of it.

        Rows are in the order of `read`.

        Raises ModelError when it is missing or stored otherwise.
        """

    def read_quantized(self, name: str, part: Part | None = None) -> QuantizedMatrix | None:
        """The numbers of a matrix, where the file holds such and no blocks of GGUF; else None.

        Raises ModelError when it is missing or damaged.
        """

    def rope_factors(self) -> Tensor | None:
        """Divisors of the rope frequencies, float32 [head_dim / 2], where the file has them."""
