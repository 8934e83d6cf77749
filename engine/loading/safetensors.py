"""A directory with config.json and safetensors files, as Hugging Face models come.

Only JSON and raw tensors are read, never a pickle or code of the repository. The files are mapped,
so a tensor takes memory while it is converted and no longer. Quantised matrices are read as
floating point, or as the numbers that they are.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pagewire.engine import config
from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Part, Storage
from pagewire.engine.loading.stored_tensor import SafetensorsFile, StoredTensor
from pagewire.engine.loading.tensor_names import with_our_names
from pagewire.engine.loading.weight_format import FLOATS
from pagewire.engine.loading.weight_formats import weight_format
from pagewire.kernels.int4_linear import Int4Blocks
from pagewire.kernels.quantized_matrix import QuantizedMatrix

INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """Implements `pagewire.engine.loading.checkpoint.Checkpoint`.

    Raises ModelError when a file is missing or damaged, or the model is not supported.
    """

    def __init__(self, directory: Path) -> None:
        self._title = f"model {directory.name}"
        with _naming(self._title):
            values = _read_json(directory / "config.json")
            self.config = config.from_hugging_face(values)
        stored: dict[str, StoredTensor] = {}
        for path in _weight_files(directory):
            file = _open(path)
            names = file.keys()
            stored |= {name: StoredTensor(file=file, name=name) for name in names}
        with _naming(self._title):
            self._tensors = with_our_names(stored, self.config)
            self._format = weight_format(values, self._tensors)

    @property
    def quantized_as(self) -> str | None:
        return None if self._format is None else self._format.title

    def read(self, name: str, into: Tensor, part: Part | None = None) -> None:
        quantized = self.storage(name) is not Storage.FLOAT
        shape = part.whole_shape(into.shape) if part else tuple(into.shape)
        with _naming(f"{self._title}: tensor {name}"):
            if quantized:
                matrix = self._matrix(name)
                _require_shape(tuple(matrix.quants.shape), shape)
                values = _part_of(matrix, part).dequantized()
            else:
                values = self._floats(name, shape, part)
        into.copy_(values)

    def storage(self, name: str) -> Storage:
        module = name.removesuffix(".weight")
        stored = Storage.FLOAT if self._format is None else self._format.storage(module)
        if stored is Storage.FLOAT and name not in self._tensors:
            raise ModelError(f"{self._title} has no tensor {name}")
        return stored

    def read_int4(self, name: str, part: Part | None = None) -> Int4Blocks:
        if self.storage(name) is not Storage.INT4:
            raise ModelError(f"{self._title}: tensor {name} has no 4-bit blocks")
        with _naming(f"{self._title}: tensor {name}"):
            return _part_of(self._matrix(name), part).int4_blocks()

    def read_quantized(self, name: str, part: Part | None = None) -> QuantizedMatrix | None:
        if self.storage(name) is Storage.FLOAT:
            return None
        with _naming(f"{self._title}: tensor {name}"):
            return _part_of(self._matrix(name), part)

    def _floats(self, name: str, shape: tuple[int, ...], part: Part | None) -> Tensor:
        """A tensor of this shape, or a part of it, in the dtype of the file."""
        tensor = self._tensors[name]
        _require_shape(tensor.shape, shape)
        if tensor.dtype not in FLOATS:
            raise ModelError(f"it is of type {tensor.dtype}; supported are {', '.join(FLOATS)}")
        return tensor.read(part)

    def _matrix(self, name: str) -> QuantizedMatrix:
        assert self._format is not None  # otherwise nothing is quantised
        return self._format.matrix(name.removesuffix(".weight"))

    def rope_factors(self) -> Tensor | None:
        return None


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say in an error what it is about. Raises ModelError for a ModelError or ValueError."""
    try:
        yield
    except (ModelError, ValueError) as error:
        raise ModelError(f"{what}: {error}") from error


def _require_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ModelError(f"its shape is {list(found)}, but config.json asks for {list(wanted)}")


def _part_of(matrix: QuantizedMatrix, part: Part | None) -> QuantizedMatrix:
    if part is None:
        return matrix
    return matrix.rows(part.index) if part.dim == 0 else matrix.columns(part.index)


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


def _open(path: Path) -> SafetensorsFile:
    try:
        file: SafetensorsFile = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"model {path.parent.name}: {path.name} is truncated or damaged ({error}); "
            "download the model again"
        ) from error
    return file
