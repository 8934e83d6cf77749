"""What this machine has, as plain values. The judgement is `doctor`'s."""

import importlib.util
import platform
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from pagewire.cluster.config import ServeConfig
from pagewire.cluster.errors import GpuDriverError
from pagewire.cluster.gpu_inventory import GpuInventory, TorchCuda
from pagewire.cluster.nvml import inspect_gpus
from pagewire.cluster.placement import available_cores
from pagewire.cluster.torch_cuda import inspect_torch_cuda
from pagewire.engine.loading.resolve import DEFAULT_PACKAGE
from pagewire.kv_transfer.checksum import IMPLEMENTATION
from pagewire.kv_transfer.select import UcxProbe, probe

_SHARED_MEMORY = Path("/dev/shm")
_RDMA_DEVICES = Path("/sys/class/infiniband")  # RoCE, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine, as `doctor` sees it. Memory in bytes."""

    python: tuple[int, int]
    system: str
    cores: int
    memory_available: int
    shared_memory_free: int | None  # None: there is no /dev/shm
    torch: str | None  # version
    gpus: GpuInventory | None  # None: no NVIDIA driver, or it does not answer
    gpu_driver_problem: str  # why it does not answer; empty: it does, or there is none
    torch_cuda: TorchCuda
    kernels: str  # which operations a worker would run, on the CPU
    kernels_remedy: str  # empty: they are the fast ones
    checksums: str  # "C++" or "zlib"
    matrices: str  # how a worker would store and multiply them by default
    ray: str | None  # version
    ray_has_dashboard: bool
    ucx: UcxProbe
    rdma_devices: tuple[str, ...]  # network cards with RDMA, such as mlx5_0
    has_default_model: bool
    ports: Mapping[str, int]  # that `pagewire serve` wants by default, by parameter
    taken_ports: frozenset[int]


def inspect_machine() -> Machine:
    """Look at this machine. Loads torch and UCX; takes a few seconds."""
    kernels, kernels_remedy, matrices = _kernels()
    gpus, gpu_driver_problem = _gpus()
    parameters = ("port", "dashboard_port")
    ports = {name: int(ServeConfig.model_fields[name].default) for name in parameters}
    return Machine(
        python=sys.version_info[:2],
        system=platform.system(),
        cores=available_cores(),
        memory_available=psutil.virtual_memory().available,
        shared_memory_free=(
            shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None
        ),
        torch=_version("torch"),
        gpus=gpus,
        gpu_driver_problem=gpu_driver_problem,
        torch_cuda=inspect_torch_cuda(),
        kernels=kernels,
        kernels_remedy=kernels_remedy,
        checksums=IMPLEMENTATION,
        matrices=matrices,
        ray=_version("ray"),
        ray_has_dashboard=importlib.util.find_spec("aiohttp_cors") is not None,
        ucx=probe(),
        rdma_devices=_rdma_devices(),
        has_default_model=importlib.util.find_spec(DEFAULT_PACKAGE) is not None,
        ports=ports,
        taken_ports=frozenset(port for port in ports.values() if _is_taken(port)),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _rdma_devices() -> tuple[str, ...]:
    if not _RDMA_DEVICES.is_dir():
        return ()
    return tuple(sorted(path.name for path in _RDMA_DEVICES.iterdir()))


def _gpus() -> tuple[GpuInventory | None, str]:
    try:
        return inspect_gpus(), ""
    except GpuDriverError as error:
        return None, str(error)


def _kernels() -> tuple[str, str, str]:
    """What runs operations, what would make it faster, and what runs matrices."""
    try:
        from pagewire.engine.load import default_matrices, select_kernels
    except ImportError:
        return "none: they need torch", "make install", "none: they need torch"
    selected = select_kernels("auto", "cpu")
    return selected.explanation, selected.remedy, default_matrices(selected)


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
