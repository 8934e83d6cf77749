"""Which dtype a device computes in fastest. Imports no torch: the command line asks it."""

from pagewire.kernels.cpu_flags import cpu_flags

# x86: AVX-512 and AMX dot products; Arm: the bf16 extension.
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def default_dtype(device: str, flags: frozenset[str] | None = None) -> str:
    """bfloat16, or float32 on a CPU that would only emulate it.

    Without the instructions a bfloat16 prefill took three times as long as a float32 one. `flags`
    are the CPU's; None reads them from the operating system.
    """
    if device != "cpu":
        return "bfloat16"
    return "bfloat16" if _BFLOAT16_FLAGS & (cpu_flags() if flags is None else flags) else "float32"
