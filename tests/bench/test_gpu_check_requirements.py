"""The check of a GPU needs few packages: it runs where Pagewire is not installed."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gpu_stages.stages import STAGES

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "triton", "transformers", "grpcio", "protobuf", "msgpack", "numpy")
# Loaded by Python at its start, in every process, from a folder of PYTHONPATH.
NO_OTHERS = """
import sys

BLOCKED = frozenset({blocked!r})

class NoOthers:
    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            return None
        return self._finder.find_spec(name, path, target)

sys.meta_path[:] = map(NoOthers, sys.meta_path)
"""
IMPORT_ALL = """
import sys
from importlib import import_module
from pathlib import Path
import gpu_check
for path in sorted(Path(gpu_check.__file__).parent.glob("gpu_stages/**/*.py")):
    parts = path.relative_to(Path(gpu_check.__file__).parent).with_suffix("").parts
    import_module(".".join(parts))
"""


def required_by(names: tuple[str, ...]) -> set[str]:
    """These distributions, and all that they need."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        for requirement in requirements:
            if "extra ==" not in requirement:
                waiting.append(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])
    return found


@pytest.fixture
def without_others(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds no other distribution."""
    allowed = required_by(NEEDED)
    blocked = [
        module
        for module, distributions in metadata.packages_distributions().items()
        if module != "pagewire"
        and not any(re.sub(r"[-_.]+", "-", each).lower() in allowed for each in distributions)
    ]
    assert {"ray", "fastapi", "pytest"} <= set(blocked)
    (tmp_path / "sitecustomize.py").write_text(NO_OTHERS.format(blocked=sorted(blocked)))
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "src", ROOT / "bench")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}


def test_every_module_can_be_loaded(without_others: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], env=without_others, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_other_packages_are_missing(without_others: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import ray"], env=without_others, capture_output=True, text=True
    )
    assert "No module named 'ray'" in done.stderr


@pytest.mark.slow
def test_the_whole_check_runs_without_a_gpu(without_others: dict[str, str], tmp_path: Path) -> None:
    program, out = ROOT / "bench" / "gpu_check.py", tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(program), "--out", str(out)],
        env=without_others,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["device"] == "cpu (tiny sizes)"
    assert [stage["name"] for stage in result["stages"]] == [stage.name for stage in STAGES]
    assert all(stage["measurements"] for stage in result["stages"])
    again = subprocess.run(
        [sys.executable, str(program), "--table", str(out / "result.json")],
        env=without_others,
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.strip() in done.stdout
