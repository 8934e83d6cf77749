"""Compiles kernels for a GPU that need not be there, and reads what became of them.

Triton brings what this takes: the assembler and both disassemblers of CUDA.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pagewire.kernels.gpu.variant import Variant

# An SM of Hopper lends one block so much shared memory; the compiler does not check.
MAX_SHARED_BYTES = 232_448

# Matrix products of a warp group (Hopper) and of a warp, in floats and in 8 bits, tiles fetched by
# the TMA unit, and asynchronous copies.
INSTRUCTIONS = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "UTMALDG", "UTMASTG", "LDGSTS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What one variant takes of an SM, and which instructions it is made of."""

    registers: int  # of a thread
    spilled_bytes: int  # of a thread, in local memory
    shared_bytes: int
    instructions: Mapping[str, int]  # how many of INSTRUCTIONS, without those that are missing

    def problems(self, variant: Variant) -> tuple[str, ...]:
        """What must not be, as sentences; made for sm_90."""
        problems = []
        if self.spilled_bytes:
            problems.append(
                f"{variant.name} spills {self.spilled_bytes} bytes a thread: smaller tiles, or "
                "more warps"
            )
        if self.shared_bytes > MAX_SHARED_BYTES:
            problems.append(
                f"{variant.name} needs {self.shared_bytes} bytes of shared memory, an SM lends "
                f"{MAX_SHARED_BYTES}: smaller tiles, or fewer stages"
            )
        missing = [name for name in variant.requires if name not in self.instructions]
        if missing:
            problems.append(f"{variant.name} has no {' and no '.join(missing)}")
        return tuple(problems)


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compile for GPUs of compute capability `capability` / 10.

    Raises RuntimeError where Triton interprets kernels in this process: it can do one of both.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted in this process; unset TRITON_INTERPRET")
    names = variant.kernel.arg_names
    types = {name: variant.arguments.get(name, "constexpr").partition(":")[0] for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, written in variant.arguments.items()
        if written.endswith(":16")
    }
    source = ASTSource(variant.kernel, types, constexprs=dict(variant.constants), attrs=aligned)
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": variant.launch.num_warps,
            "num_stages": variant.launch.num_stages,
        },
    )
    return _read(kernel)


def _read(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        listing = _run(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    resources = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", usage)}
    counts = {name: len(re.findall(rf"\b{name}\b", listing)) for name in INSTRUCTIONS}
    return Compiled(
        registers=resources["REG"],
        spilled_bytes=resources["STACK"] + resources["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        instructions={name: count for name, count in counts.items() if count},
    )


def _run(program: str, *arguments: str) -> str:
    return subprocess.run(
        [Path(program), *arguments], capture_output=True, text=True, check=True
    ).stdout
