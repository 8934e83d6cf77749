"""What only a GPU computes fast: plain torch emulates it on a CPU, for those who ask for it."""

from pagewire.engine.errors import KernelError


def no_kernels(setting: str, device: str, *, instead: str) -> KernelError:
    """Nobody is slow by accident: what has no kernels is an error, which says what to choose.

    `setting`: name and value, "quantization fp8"; `instead`: the values to choose on another device
    than a CPU.
    """
    remedy = "int8, or kernels torch, which emulates it slowly" if device == "cpu" else instead
    return KernelError(f"{setting} has no kernels for device {device}; choose {remedy}")
