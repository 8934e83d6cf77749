"""The seam between a model's file format and its weights."""

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


class Checkpoint(Protocol):
    """An open model on disk, with its tensors by their Hugging Face names."""

    config: ModelConfig

    @property
    def quantized_as(self) -> str | None:
        """For people: how the file holds matrices, where that is a choice of its maker."""

    def read(self, name: str, into: Tensor) -> None:
        """Convert one tensor to the dtype of `into` and write it there.

        Raises ModelError when it is missing or its shape is not that of `into`.
        """

    def storage(self, name: str) -> Storage:
        """How the file holds a tensor. Raises ModelError when it is missing."""

    def read_int4(self, name: str) -> Int4Blocks:
        """The blocks of a matrix whose storage is INT4, rows in the order of `read`.

        Raises ModelError when it is missing or stored otherwise.
        """

    def read_quantized(self, name: str) -> QuantizedMatrix | None:
        """The numbers of a matrix, where the file holds such and no blocks of GGUF; else None.

        Raises ModelError when it is missing or damaged.
        """

    def rope_factors(self) -> Tensor | None:
        """Divisors of the rope frequencies, float32 [head_dim / 2], where the file has them."""
