"""What only a GPU computes fast: plain torch emulates it on a CPU, for those who ask for it.

Imports no torch: the command line asks it before it starts a worker.
"""

from collections.abc import Mapping

from pagewire.engine.errors import KernelError
from pagewire.kernels.errors import KernelsUnavailableError
from pagewire.kernels.instruction_sets import built_sets
from pagewire.kernels.triton_device import require_triton_device

_EMULATED = frozenset({"fp8", "w4a16"})  # values of Quantization and of KVCacheDtype


def no_kernels(setting: str, device: str, *, instead: str) -> KernelError:
    """Nobody is slow by accident: what has no kernels is an error, which says what to choose.

    `setting`: name and value, "quantization fp8"; `instead`: the values to choose on another device
    than a CPU.
    """
    remedy = "int8, or kernels torch, which emulates it slowly" if device == "cpu" else instead
    return KernelError(f"{setting} has no kernels for device {device}; choose {remedy}")


def require_cpu_kernels(kernels: str, forms: Mapping[str, str]) -> None:
    """Raise KernelError for what a worker on a CPU refuses to run.

    `kernels` is a value of Kernels; `forms` are those in which matrices and KV are stored, by the
    name of the parameter.
    """
    if kernels == "triton":
        try:
            require_triton_device("cpu")
        except KernelsUnavailableError as error:
            raise KernelError(f"kernels is {kernels}: {error}") from error
    if kernels == "native" or (kernels == "auto" and built_sets()):
        for name, form in forms.items():
            if form in _EMULATED:
                raise no_kernels(f"{name} {form}", "cpu", instead="")
