"""What the CPU of this machine can do, as the operating system names it. Imports no torch."""

from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")

# x86: dot products of AVX-512 and AMX; Arm: the bf16 extension.
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU, as Linux names them; empty where they cannot be known."""
    try:
        text = _CPU_INFO.read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def has_bfloat16(flags: frozenset[str] | None = None) -> bool:
    """Whether a CPU multiplies bfloat16 in hardware; None asks for the flags of this one."""
    return bool(_BFLOAT16_FLAGS & (cpu_flags() if flags is None else flags))
