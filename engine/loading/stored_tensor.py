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
class TensorPart:
    """Rows `start` to `end` of a matrix, or of the matrix of one expert."""

    start: int
    end: int
    expert: int | None = None  # of a tensor [num_experts, rows, columns]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTensor:
    """Takes memory only once it is read."""

    file: SafetensorsFile
    name: str  # in the file
    where: TensorPart | None = None  # what this is of it; None: all

    @property
    def shape(self) -> list[int]:
        """Of the whole tensor in the file."""
        return self.file.get_slice(self.name).get_shape()

    @property
    def dtype(self) -> str:
        """As safetensors calls it: F32, BF16, I32, …"""
        return self.file.get_slice(self.name).get_dtype()

    def part(self, where: TensorPart) -> "StoredTensor":
        return StoredTensor(file=self.file, name=self.name, where=where)

    def read(self) -> Tensor:
        if self.where is None:
            return self.file.get_tensor(self.name)
        stored, rows = self.file.get_slice(self.name), slice(self.where.start, self.where.end)
        if self.where.expert is None:
            return stored[rows,]
        return stored[self.where.expert : self.where.expert + 1, rows][0]
