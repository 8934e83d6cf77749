"""The implementations of the operations that this machine can run."""

import platform

from native_kernels import native_library
from torch import Tensor

from pagewire.kernels.cpu_flags import cpu_flags
from pagewire.kernels.instruction_sets import runnable_sets
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.ops import GroupedActivation, Ops
from pagewire.kernels.torch_ops import TorchOps

_NATIVE = {each.name: each for each in runnable_sets(platform.machine(), cpu_flags())}
IMPLEMENTATIONS = ("torch", *_NATIVE)


def load_implementation(name: str) -> Ops:
    """One of IMPLEMENTATIONS; skips the test where it was not built."""
    if name == "torch":
        return TorchOps()
    return NativeOps(native_library(_NATIVE[name]))


def in_groups(ops: Ops, x: Tensor) -> GroupedActivation:
    """x as operations of a CPU quantise it."""
    quantized = ops.quantize(x)
    assert isinstance(quantized, GroupedActivation)
    return quantized
