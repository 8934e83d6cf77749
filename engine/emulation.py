"""What no kernel computes: plain torch emulates it on a CPU, for those who ask for plain torch."""

from pagewire.engine.errors import KernelError
from pagewire.kernels.select import SelectedOps
from pagewire.kernels.torch_ops import TorchOps


def require_emulation(setting: str, device: str, selected: SelectedOps, *, instead: str) -> None:
    """Raise KernelError unless plain torch runs on a CPU: nobody is slow by accident.

    `setting`: name and value of what is emulated, "quantization fp8"; `instead`: the value
    to choose on another device.
    """
    if device == "cpu" and isinstance(selected.ops, TorchOps):
        return
    remedy = "int8, or kernels torch, which emulates it slowly" if device == "cpu" else instead
    raise KernelError(f"{setting} has no kernels for device {device}; choose {remedy}")
