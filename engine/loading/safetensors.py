"""A directory with config.json and safetensors files, as Hugging Face models come.

Only JSON and raw tensors are read, never a pickle or code of the repository. The files are mapped,
so a tensor takes memory while it is converted and no longer.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pagewire.engine import config
from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Storage
from pagewire.engine.loading.expert_names import with_our_names
from pagewire.engine.loading.stored_tensor import SafetensorsFile, StoredTensor
from pagewire.kernels.int4_linear import Int4Blocks

DTYPES = ("F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"


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
        stored: dict[str, StoredTensor] = {}
        for path in _weight_files(directory):
            file = _open(path)
            names = file.keys()
            stored |= {name: StoredTensor(file=file, name=name) for name in names}
        self._tensors = with_our_names(stored)

    def read(self, name: str, into: Tensor) -> None:
        tensor = self._tensor(name)
        if tensor.shape != list(into.shape):
            raise ModelError(
                f"model {self._directory.name}: tensor {name} has shape {tensor.shape}, "
                f"but config.json asks for {list(into.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ModelError(
                f"model {self._directory.name}: tensor {name} is of type {tensor.dtype}; "
                f"supported are {', '.join(DTYPES)}"
            )
        into.copy_(tensor.read())

    def storage(self, name: str) -> Storage:
        self._tensor(name)
        return Storage.FLOAT

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise ModelError(f"model {self._directory.name} has no tensor {name}")
        return self._tensors[name]

    def read_int4(self, name: str) -> Int4Blocks:
        raise ModelError(f"model {self._directory.name}: tensor {name} has no 4-bit blocks")

    def rope_factors(self) -> Tensor | None:
        return None


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
