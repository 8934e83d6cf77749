"""A directory with config.json and safetensors files, as Hugging Face models come.

Only JSON and raw tensors are read, never a pickle or code of the repository. The files are mapped,
so a tensor takes memory while it is converted and no longer.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pagewire.engine import config
from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Part, Storage
from pagewire.kernels.int4_linear import Int4Blocks

DTYPES = ("F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"


class _StoredTensor(Protocol):
    """A tensor of an open file, not read yet."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...


class _File(Protocol):
    """What is used of `safetensors.safe_open`, which has no types."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> _StoredTensor: ...

    def get_tensor(self, name: str) -> Tensor: ...


class SafetensorsCheckpoint:
    """Implements `pagewire.engine.loading.checkpoint.Checkpoint`.

    Raises ModelError when a file is missing or damaged, or the model is not supported.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            self.config = config.from_hugging_face(_read_json(directory / "config.json"))
        except ModelError as error:
            raise ModelError(f"model {directory.name}: {error}") from error
        self._files: dict[str, _File] = {}  # by tensor name
        for path in _weight_files(directory):
            file = _open(path)
            self._files.update(dict.fromkeys(file.keys(), file))

    def read(self, name: str, into: Tensor, part: Part | None = None) -> None:
        file = self._files.get(name)
        if file is None:
            raise ModelError(f"model {self._directory.name} has no tensor {name}")
        stored = file.get_slice(name)
        shape = list(part.whole_shape(into.shape) if part else into.shape)
        if stored.get_shape() != shape:
            raise ModelError(
                f"model {self._directory.name}: tensor {name} has shape {stored.get_shape()}, "
                f"but config.json asks for {shape}"
            )
        if stored.get_dtype() not in DTYPES:
            raise ModelError(
                f"model {self._directory.name}: tensor {name} is of type {stored.get_dtype()}; "
                f"supported are {', '.join(DTYPES)}"
            )
        into.copy_(stored[_slices(part)] if part else file.get_tensor(name))

    def storage(self, name: str) -> Storage:
        if name not in self._files:
            raise ModelError(f"model {self._directory.name} has no tensor {name}")
        return Storage.FLOAT

    def read_int4(self, name: str, part: Part | None = None) -> Int4Blocks:
        raise ModelError(f"model {self._directory.name}: tensor {name} has no 4-bit blocks")

    def rope_factors(self) -> Tensor | None:
        return None


def _slices(part: Part) -> tuple[slice, ...]:
    """The index of a part: no more than that is read from the file."""
    return (slice(None),) * part.dim + (slice(part.index.start, part.index.stop),)


def _weight_files(directory: Path) -> list[Path]:
    """The files that the index names, or without one all safetensors files."""
    index = directory / INDEX
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ModelError(f"model {directory.name} has no safetensors files")
        return files
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"model {directory.name}: {INDEX} has no weight_map")
    # The name alone: an index must not lead out of the directory.
    names = sorted({Path(str(name)).name for name in weight_map.values()})
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ModelError(
            f"model {directory.name}: {INDEX} names {', '.join(missing)}, not found beside it; "
            "download the model again"
        )
    return [directory / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path.name} is not a JSON object")
    return values


def _open(path: Path) -> _File:
    try:
        file: _File = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"model {path.parent.name}: {path.name} is truncated or damaged ({error}); "
            "download the model again"
        ) from error
    return file
