"""A tensor of an open safetensors file, or a part of one, that has not been read yet."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class TensorSlice(Protocol):
    """What is used of `safe_open(...).get_slice(name)`, which has no types."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...


class SafetensorsFile(Protocol):
    """What is used of `safetensors.safe_open`, which has no types."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> TensorSlice: ...

    def get_tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPart:
    """Rows `start` to `end` of the matrix of one expert."""

    expert: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTensor:
    """Takes memory only once it is read."""

    file: SafetensorsFile
    name: str  # in the file
    part: ExpertPart | None = None  # of a tensor [num_experts, rows, columns]; None: all of it

    @property
    def shape(self) -> list[int]:
        shape = self.file.get_slice(self.name).get_shape()
        return shape if self.part is None else [self.part.end - self.part.start, *shape[2:]]

    @property
    def dtype(self) -> str:
        """As safetensors calls it: F32, BF16, I32, …"""
        return self.file.get_slice(self.name).get_dtype()

    def read(self) -> Tensor:
        if self.part is None:
            return self.file.get_tensor(self.name)
        expert, rows = self.part.expert, slice(self.part.start, self.part.end)
        return self.file.get_slice(self.name)[expert : expert + 1, rows][0]
