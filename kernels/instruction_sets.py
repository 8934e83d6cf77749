"""The builds of the C++ kernels: which of them a CPU can run, and which lie beside the sources.

Imports no torch: the command line asks it too.
"""

import platform
from dataclasses import dataclass
from pathlib import Path

from pagewire.kernels.cpu_flags import cpu_flags

FOLDER = Path(__file__).parent / "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionSet:
    """One build of the kernels."""

    name: str
    title: str
    machine: str
    flags: frozenset[str]  # what a CPU must have, in the words of `cpu_flags`

    @property
    def file_name(self) -> str:
        return f"_{self.name}.so"


INSTRUCTION_SETS = (  # the fastest first
    InstructionSet(
        name="avx512",
        title="AVX-512",
        machine="x86_64",
        flags=frozenset(
            {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma", "f16c"}
        ),
    ),
    InstructionSet(
        name="avx2", title="AVX2", machine="x86_64", flags=frozenset({"avx2", "fma", "f16c"})
    ),
    InstructionSet(
        name="neon", title="NEON", machine="aarch64", flags=frozenset({"asimd", "asimddp"})
    ),
)


def runnable_sets(machine: str, flags: frozenset[str]) -> tuple[InstructionSet, ...]:
    """The instruction sets that a CPU can run, the fastest first."""
    return tuple(
        each for each in INSTRUCTION_SETS if each.machine == machine and each.flags <= flags
    )


def built_sets(folder: Path = FOLDER) -> tuple[InstructionSet, ...]:
    """Those of this CPU whose library lies in `folder`, the fastest first."""
    runnable = runnable_sets(platform.machine(), cpu_flags())
    return tuple(each for each in runnable if (folder / each.file_name).exists())
