"""What the CPU of this machine can do, as the operating system names it. Imports no torch."""

from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


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
