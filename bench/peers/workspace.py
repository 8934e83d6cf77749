"""Where the peers live: environments, exported models and logs, all below one ignored folder."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEFAULT_FOLDER = ROOT / ".bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """What every peer is started with."""

    model: Path  # the GGUF file that all engines run, as it is or exported
    folder: Path = DEFAULT_FOLDER

    @property
    def safetensors(self) -> Path:
        """The model in bfloat16, as `peers.export` writes it."""
        return self.folder / "models" / "safetensors"

    @property
    def openvino_int8(self) -> Path:
        """The model in OpenVINO's format with 8-bit weights."""
        return self.folder / "models" / "openvino-int8"

    def binary(self, environment: str, name: str) -> Path:
        """A program of a peer's own virtual environment."""
        return self.folder / environment / "bin" / name

    def log(self, peer: str) -> Path:
        """Where a peer's output goes."""
        return self.folder / "logs" / f"{peer}.log"

    def missing(self, *paths: Path) -> str | None:
        """Why a peer that needs these files cannot run; None when it can."""
        absent = [path for path in paths if not path.exists()]
        if not absent:
            return None
        names = ", ".join(str(path.relative_to(self.folder.parent)) for path in absent)
        return f"{names} not there; run `make bench-peers`"


def cores() -> list[int]:
    """The cores that this process may use, and so every engine that it starts."""
    return sorted(os.sched_getaffinity(0))


def pagewire_environment() -> dict[str, str]:
    """What lets a child of this interpreter import Pagewire and the folders of bench/.

    Its workers run on the CPU, as the other engines do.
    """
    folders = [str(ROOT / "src"), str(ROOT / "bench")]
    return {"PYTHONPATH": os.pathsep.join(folders), "PAGEWIRE_DEVICE": "cpu"}


def pagewire_command(*arguments: str) -> list[str]:
    """The command line of this very Pagewire, whatever else is installed."""
    return [sys.executable, "-c", "from pagewire.cli import main; main()", *arguments]
