"""A tensor of an open safetensors file, or a part of one, that has not been read yet."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pagewire.engine.loading.checkpoint import Part


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
    def shape(self) -> tuple[int, ...]:
        shape = self.file.get_slice(self.name).get_shape()
        if self.where is None:
            return tuple(shape)
        columns = shape[1:] if self.where.expert is None else shape[2:]
        return self.where.end - self.where.start, *columns

    @property
    def dtype(self) -> str:
        """As safetensors calls it: F32, BF16, I32, …"""
        return self.file.get_slice(self.name).get_dtype()

    def matrix(self, where: TensorPart) -> "StoredTensor":
        """One of several matrices in this tensor."""
        return StoredTensor(file=self.file, name=self.name, where=where)

    def read(self, part: Part | None = None) -> Tensor:
        """All of it or a part; no more than that is read from the file."""
        if self.where is None and part is None:
            return self.file.get_tensor(self.name)
        index = [slice(0, size) for size in self.shape]
        if part is not None:
            index[part.dim] = slice(part.index.start, part.index.stop)
        stored, where = self.file.get_slice(self.name), self.where
        if where is None:
            return stored[tuple(index)]
        rows = slice(where.start + index[0].start, where.start + index[0].stop)
        if where.expert is None:
            return stored[(rows, *index[1:])]
        return stored[(slice(where.expert, where.expert + 1), rows, *index[1:])][0]
