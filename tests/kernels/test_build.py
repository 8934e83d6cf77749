"""How setup.py builds the C++ kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pagewire.kernels.instruction_sets import FOLDER, INSTRUCTION_SETS

ROOT = Path(__file__).parents[2]
# Stands in for the compiler: writes down what it was to make, and makes it empty.
COMPILER = """#!/bin/sh
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then echo "$2" >> "$COMMANDS"; : > "$2"; fi
    shift
done
"""


def test_no_library_is_linked_from_objects_of_another(tmp_path: Path) -> None:
    """They are built side by side from the same sources, each with its own instructions."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    made = tmp_path / "made"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--force"]
    folders = [f"--build-temp={tmp_path / 'temp'}", f"--build-lib={tmp_path / 'lib'}"]
    tools = {"CC": str(compiler), "CXX": str(compiler), "LDSHARED": f"{compiler} -shared"}
    subprocess.run(
        [*command, *folders],
        cwd=ROOT,
        env={**os.environ, **tools, "COMMANDS": str(made)},
        check=True,
    )
    targets = made.read_text().split()
    assert {Path(each).suffix for each in targets} == {".o", ".so"}
    assert len(targets) == len(set(targets))


def test_each_library_has_only_instructions_of_its_own() -> None:
    avx2 = next(each for each in INSTRUCTION_SETS if each.name == "avx2")
    objdump = shutil.which("objdump")
    if objdump is None or not (FOLDER / avx2.file_name).exists():
        pytest.skip("needs the AVX2 build and objdump (apt install binutils)")
    command = [objdump, "--disassemble", "--no-show-raw-insn", str(FOLDER / avx2.file_name)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "%ymm" in listing
    assert "%zmm" not in listing
