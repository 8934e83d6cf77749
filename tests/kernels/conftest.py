"""Every implementation of the operations that this machine can run, one after another."""

import platform

import pytest

from pagewire.kernels.cpu_flags import cpu_flags
from pagewire.kernels.instruction_sets import runnable_sets
from pagewire.kernels.native_library import NativeLibraryError, load_library
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.ops import Ops
from pagewire.kernels.torch_ops import TorchOps

TORCH = "torch"
NATIVE = {each.name: each for each in runnable_sets(platform.machine(), cpu_flags())}


@pytest.fixture(scope="session", params=[TORCH, *NATIVE])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == TORCH:
        return TorchOps()
    try:
        return NativeOps(load_library(NATIVE[request.param]))
    except NativeLibraryError as error:
        pytest.skip(str(error))
