"""The seam between a model's file format and its weights."""

from typing import Protocol

from torch import Tensor

from pagewire.engine.config import ModelConfig


class Checkpoint(Protocol):
    """An open model on disk, with its tensors by their Hugging Face names."""

    config: ModelConfig

    def read(self, name: str, into: Tensor) -> None:
        """Convert one tensor to the dtype of `into` and write it there.

        Raises ModelError when it is missing or its shape is not that of `into`.
        """

    def rope_factors(self) -> Tensor | None:
        """Divisors of the rope frequencies, float32 [head_dim / 2], where the file has them."""
