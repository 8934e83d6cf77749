"""Every implementation of the operations that this machine can run, one after another."""

import platform

import pytest
from implementations import IMPLEMENTATIONS, load_implementation
from native_kernels import native_library

from pagewire.kernels.cpu_flags import cpu_flags
from pagewire.kernels.instruction_sets import runnable_sets
from pagewire.kernels.native_library import NativeLibrary
from pagewire.kernels.ops import Ops


@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_implementation(request.param)


@pytest.fixture(
    scope="session",
    params=runnable_sets(platform.machine(), cpu_flags()),
    ids=lambda each: str(each.name),
)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    """Each build that this CPU can run."""
    return native_library(request.param)
