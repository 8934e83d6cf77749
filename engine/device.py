"""Whether torch can use the device that a worker was asked to run on."""

import torch

from pagewire.engine.errors import DeviceError


def num_usable_gpus() -> int:
    """GPUs that torch can use, at least one. Raises DeviceError, with the remedy."""
    if torch.version.cuda is None:
        raise DeviceError(
            "device is cuda, and this torch is built for the CPU only; install one for CUDA 13 or "
            "12 with the extra cu13 or cu12, as README says, or choose device cpu"
        )
    count = torch.cuda.device_count()
    if not count:
        raise DeviceError(
            f"device is cuda, and torch, built for CUDA {torch.version.cuda}, finds no GPU; see "
            "`pagewire doctor`, nvidia-smi and CUDA_VISIBLE_DEVICES, or choose device cpu"
        )
    return count


def require_device(device: str) -> None:
    """Raise DeviceError unless a model can be loaded on `device`, as torch names it."""
    if torch.device(device).type == "cuda":
        num_usable_gpus()
