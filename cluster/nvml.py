"""Asks the NVIDIA driver for its GPUs, through NVML: the only module that imports pynvml.

It needs no CUDA and no torch, so that a GPU is seen, too, where torch was built for the CPU.
"""

from itertools import permutations
from typing import Any

import pynvml

from pagewire.cluster.errors import GpuDriverError
from pagewire.cluster.gpu_inventory import Gpu, GpuInventory, PeerPath


def inspect_gpus(library: Any = pynvml) -> GpuInventory | None:
    """All GPUs of this machine; None where no NVIDIA driver is installed.

    `library` has the functions of pynvml. Raises GpuDriverError when the driver does not answer.
    """
    try:
        library.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return None
    except pynvml.NVMLError as error:
        raise GpuDriverError(str(error)) from error
    try:
        return _inventory(library)
    except pynvml.NVMLError as error:
        raise GpuDriverError(str(error)) from error
    finally:
        library.nvmlShutdown()


def _inventory(library: Any) -> GpuInventory:
    handles = [
        library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())
    ]
    cuda = library.nvmlSystemGetCudaDriverVersion_v2()  # 12080 is 12.8
    return GpuInventory(
        driver=library.nvmlSystemGetDriverVersion(),
        cuda=(cuda // 1000, cuda % 1000 // 10),
        gpus=tuple(_gpu(library, handle) for handle in handles),
        peer_paths={
            (source, target): _peer_path(library, handles[source], handles[target])
            for source, target in permutations(range(len(handles)), 2)
        },
    )


def _gpu(library: Any, handle: Any) -> Gpu:
    memory = _unless_unsupported(library.nvmlDeviceGetMemoryInfo, handle)
    return Gpu(
        name=library.nvmlDeviceGetName(handle),
        memory_total=None if memory is None else memory.total,
        memory_free=None if memory is None else memory.free,
        compute_capability=tuple(library.nvmlDeviceGetCudaComputeCapability(handle)),
    )


def _peer_path(library: Any, source: Any, target: Any) -> PeerPath:
    # Writes, since pynvml's constant for reads is a tuple, which NVML cannot be called with.
    over_nvlink, at_all = (
        _unless_unsupported(library.nvmlDeviceGetP2PStatus, source, target, index)
        for index in (pynvml.NVML_P2P_CAPS_INDEX_NVLINK, pynvml.NVML_P2P_CAPS_INDEX_WRITE)
    )
    if at_all is None:
        return PeerPath.UNKNOWN
    if at_all != pynvml.NVML_P2P_STATUS_OK:
        return PeerPath.NONE
    return PeerPath.NVLINK if over_nvlink == pynvml.NVML_P2P_STATUS_OK else PeerPath.PCIE


def _unless_unsupported(function: Any, *arguments: Any) -> Any:
    """What the driver answers; None where this GPU has no such thing."""
    try:
        return function(*arguments)
    except pynvml.NVMLError_NotSupported:
        return None
