"""The NVIDIA GPUs of a machine, as plain values: what their driver says, and what torch can use."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class PeerPath(StrEnum):
    """How one GPU writes to the memory of another."""

    NVLINK = "NVLink"
    PCIE = "PCIe"
    NONE = "none"  # only through host memory
    UNKNOWN = "?"  # the driver does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. Memory in bytes; None where it has none of its own, as on a system on a chip."""

    name: str
    memory_total: int | None
    memory_free: int | None
    compute_capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuInventory:
    """All GPUs that the driver knows, whether or not this process may use them."""

    driver: str  # its version
    cuda: tuple[int, int]  # the newest CUDA that it runs
    gpus: tuple[Gpu, ...]
    peer_paths: Mapping[tuple[int, int], PeerPath]  # by index: (from, to)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchCuda:
    """What the installed torch can do with GPUs."""

    cuda: str | None = None  # that it was built for; None: for the CPU only
    num_gpus: int = 0  # that it can use
    nccl: str | None = None  # version
    kernels: str = ""  # which operations would run on a GPU; empty where it can use none
    kernels_remedy: str = ""  # empty: they are the fast ones
