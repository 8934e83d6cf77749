"""The variants of every kernel compile for Hopper, to what is kept of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from pagewire.kernels.gpu.compiled import MAX_SHARED_BYTES, Compiled, compile_variant
from pagewire.kernels.gpu.variant import LaunchConfig, Variant, all_variants

BENCH = Path(__file__).parents[3] / "bench" / "compiled_kernels.py"

MATMUL = Variant(
    name="matmul",
    kernel=None,
    arguments={},
    constants={},
    launch=LaunchConfig(num_warps=4),
    requires=("HGMMA",),
)


def run(*arguments: str) -> None:
    """In a process of its own, since kernels are interpreted in this one."""
    command = [sys.executable, str(BENCH), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_kernels_compile_for_hopper_as_before() -> None:
    run("--quick")


@pytest.mark.slow
def test_all_variants_compile_for_hopper_as_before_and_for_other_gpus() -> None:
    run("--all")


def test_variants_have_names_of_their_own() -> None:
    names = [variant.name for variant in all_variants()]
    assert len(set(names)) == len(names) > 0


def test_what_must_not_be() -> None:
    good = Compiled(
        registers=100,
        spilled_bytes=0,
        shared_bytes=MAX_SHARED_BYTES,
        instructions={"HGMMA": 4},
    )
    assert good.problems(MATMUL) == ()
    bad = Compiled(
        registers=255, spilled_bytes=204, shared_bytes=MAX_SHARED_BYTES + 1, instructions={}
    )
    spills, shared, missing = bad.problems(MATMUL)
    assert "spills 204 bytes" in spills
    assert "shared memory" in shared
    assert missing == "matmul has no HGMMA"


def test_an_interpreting_process_compiles_nothing() -> None:
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_variant(MATMUL, 90)
