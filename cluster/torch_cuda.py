"""What the installed torch can do with GPUs, NCCL and kernels included.

Functions import torch themselves: `pagewire doctor` must answer where it is missing.
"""

from typing import Any

from pagewire.cluster.gpu_inventory import TorchCuda


def inspect_torch_cuda() -> TorchCuda:
    """Ask torch; without torch, the answer is that of one for the CPU. Takes a second."""
    try:
        import torch
    except ImportError:
        return TorchCuda()
    if torch.version.cuda is None:
        return TorchCuda()
    nccl = _nccl_version()
    if not torch.cuda.is_available():
        return TorchCuda(cuda=torch.version.cuda, nccl=nccl)
    kernels, remedy = _kernels()
    return TorchCuda(
        cuda=torch.version.cuda,
        num_gpus=torch.cuda.device_count(),
        nccl=nccl,
        kernels=kernels,
        kernels_remedy=remedy,
    )


def _nccl_version() -> str | None:
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    nccl: Any = torch.cuda.nccl  # it has no type information
    return ".".join(map(str, nccl.version()))


def _kernels() -> tuple[str, str]:
    """What would run operations on a GPU, and what would make it faster."""
    from pagewire.engine.load import select_kernels

    selected = select_kernels("auto", "cuda")
    return selected.explanation, selected.remedy
