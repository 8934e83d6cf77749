"""Which dtype a device computes in fastest. Imports no torch: the command line asks it."""

from pagewire.kernels.cpu_flags import has_bfloat16
from pagewire.kernels.instruction_sets import built_sets


def default_dtype(
    device: str, kernels: str = "auto", *, flags: frozenset[str] | None = None
) -> str:
    """bfloat16, or float32 on a CPU that would only emulate it.

    The C++ kernels widen bfloat16 while they read it, so where they run (`kernels` is a value of
    Kernels) it is at least as fast as float32 and takes half the memory. Plain torch on a CPU
    without the instructions took three times as long for a bfloat16 prefill. `flags` are the CPU's;
    None reads them from the operating system.
    """
    if device != "cpu" or has_bfloat16(flags):
        return "bfloat16"
    return "bfloat16" if kernels in ("auto", "native") and built_sets() else "float32"
