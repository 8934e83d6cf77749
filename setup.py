"""Builds the C++ kernels, one library per instruction set, from kernels/cpu/*.cpp.

All other settings are in pyproject.toml. A library that cannot be built is left out with a warning:
Pagewire then runs in plain torch, and says so.
"""

import copy
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Which of them a CPU can run is decided at run time: see INSTRUCTION_SETS in native_library.py.
INSTRUCTION_FLAGS = {
    "x86_64": {
        "avx512": [
            "-mavx512f",
            "-mavx512bw",
            "-mavx512dq",
            "-mavx512vl",
            "-mavx512vnni",
            "-mprefer-vector-width=512",
            "-mfma",
            "-mf16c",
        ],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
    },
    "aarch64": {"neon": ["-march=armv8.2-a+dotprod"]},
}

# Not -ffast-math: NaN and infinity must stay what they are, and sums must not change their order
# from one compiler to the next. OpenMP is compiled in but not linked: torch has it loaded, and a
# second copy would bring a second set of threads.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fopenmp",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
]

SOURCES = sorted(str(path) for path in Path("kernels/cpu").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("kernels/cpu").glob("*.h"))


class BuildPlainLibrary(build_ext):
    """Shared libraries with a C ABI instead of Python modules: ctypes loads them."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.parallel = True  # the instruction sets side by side

    def build_extension(self, ext: Extension) -> None:
        # The libraries share their sources. In one folder, one would be linked from objects that
        # were compiled for another's instructions.
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp) / ext.name)
        super(BuildPlainLibrary, own).build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


# Chosen at run time inside of it: see kernels/crc32.py.
CRC32 = Extension(
    "pagewire.kernels.crc._crc32",
    sources=["kernels/crc/crc32.cpp"],
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall"],
    language="c++",
    optional=True,
)

setup(
    cmdclass={"build_ext": BuildPlainLibrary},
    ext_modules=[
        *([CRC32] if platform.machine() == "x86_64" else []),
        *(
            Extension(
                f"pagewire.kernels.cpu._{name}",
                sources=SOURCES,
                depends=HEADERS,
                extra_compile_args=FLAGS + flags,
                language="c++",
                optional=True,
            )
            for name, flags in INSTRUCTION_FLAGS.get(platform.machine(), {}).items()
        ),
    ],
)
