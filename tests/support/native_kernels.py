"""The C++ kernels in tests: a build of them, or a skip where it is missing."""

import pytest

from pagewire.kernels.instruction_sets import InstructionSet
from pagewire.kernels.native_library import (
    NativeLibrary,
    NativeLibraryError,
    find_library,
    load_library,
)


def native_library(instruction_set: InstructionSet | None = None) -> NativeLibrary:
    """One build, None for the fastest of this machine; skips the test where it was not built."""
    try:
        return find_library() if instruction_set is None else load_library(instruction_set)
    except NativeLibraryError as error:
        pytest.skip(str(error))
