"""The NEON build of the C++ kernels, compiled for Arm and run in an emulator on other machines."""

import ast
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "cpu"
CHECK = Path(__file__).parent / "cross" / "check_kernels.cpp"
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64-static"

pytestmark = pytest.mark.slow


def build_settings() -> dict[str, Any]:
    """The literals of setup.py: what is tested is compiled as it is built."""
    settings = {}
    for statement in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict | ast.List):
            (target,) = statement.targets
            assert isinstance(target, ast.Name)
            settings[target.id] = ast.literal_eval(statement.value)
    return settings


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The check for Arm, with all kernels in it."""
    for tool, package in ((COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user-static")):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (apt install {package})")
    folder = tmp_path_factory.mktemp("neon")
    settings = build_settings()
    flags = [*settings["FLAGS"], *settings["INSTRUCTION_FLAGS"]["aarch64"]["neon"]]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [COMPILER, *flags, "-Werror", f"-I{KERNELS}", "-c", str(source), "-o"]
        subprocess.run([*command, str(target)], check=True)
        return target

    # The check brings attention itself.
    sources = [CHECK, *(each for each in KERNELS.glob("*.cpp") if each.stem != "attention")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    result = folder / "check"
    subprocess.run([COMPILER, "-static", "-fopenmp", *map(str, objects), "-o", result], check=True)
    return result


@pytest.mark.parametrize("num_threads", [1, 2])
def test_kernels_for_arm_compute_what_scalar_code_does(program: Path, num_threads: int) -> None:
    run = subprocess.run(
        [EMULATOR, program],
        env={"OMP_NUM_THREADS": str(num_threads)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ok     paged_attention" in run.stdout
