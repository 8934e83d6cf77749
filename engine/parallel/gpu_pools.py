"""The page pools of ranks that have a GPU each, in one process through CUDA IPC.

A pool is an allocation of its own. torch's allocator puts tensors into larger pieces, of which CUDA
can share the whole only, or none if they can grow; and what torch shares with other processes it
counts in a named file, which a rank that is killed would leave behind. A handle is 64 bytes.
"""

import weakref
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from pagewire.engine.cuda_runtime import CudaRuntime
from pagewire.engine.errors import DeviceError, EngineError
from pagewire.engine.parallel.nccl_ranks import rank_device
from pagewire.engine.parallel.rank_group import RankLost

_TIMEOUT = timedelta(seconds=60)  # all ranks take theirs once the slowest has loaded


class ShareableMemory(Protocol):
    """Memory of devices, as `torch` names them, that other processes can open."""

    def allocate(self, num_bytes: int, device: str) -> tuple[Tensor, bytes]:
        """uint8 [num_bytes], and the handle for others. Raises DeviceError."""

    def open(self, handle: bytes, num_bytes: int, device: str) -> Tensor:
        """uint8 [num_bytes], what another process has allocated. Raises DeviceError."""

    def reach(self, device: str) -> None:
        """Take what this process needs on the device to open memory there. Raises DeviceError."""


class GpuPools:
    """Implements RankPools for one of the ranks, whose handles travel through their store."""

    def __init__(
        self,
        store: Store,
        rank: int,
        device: str,
        memory: ShareableMemory,
        *,
        timeout: timedelta = _TIMEOUT,
    ) -> None:
        """`device`: that of rank 0, as in `rank_device`; `timeout`: for another's pool."""
        self._store = store
        self._rank = rank
        self._device = device
        self._memory = memory
        self._timeout = timeout

    def reach(self, num_ranks: int) -> None:
        """Take what rank 0 needs on all devices, before any rank finds out how much is free.

        Raises EngineError.
        """
        for rank in range(num_ranks):
            device = rank_device(self._device, rank)
            try:
                self._memory.reach(device)
            except DeviceError as error:
                raise EngineError(
                    f"rank 0 copies the pages of rank {rank} and cannot use {device} beside it: "
                    f"{error}; see its memory and its compute mode in nvidia-smi, or set "
                    "tensor_parallel_size to 1"
                ) from error

    def pool(self, rank: int, num_bytes: int) -> Tensor:
        device = rank_device(self._device, rank)
        try:
            if rank == self._rank:
                memory, handle = self._memory.allocate(num_bytes, device)
                self._store.set(_key(rank), handle.hex())
                return memory
            return self._memory.open(self._handle_of(rank), num_bytes, device)
        except DeviceError as error:
            raise EngineError(
                f"rank {self._rank} cannot have the {num_bytes >> 20} MiB of KV cache of rank "
                f"{rank} on {device}: {error}; lower num_pages if its memory is full, or set "
                "tensor_parallel_size to 1"
            ) from error

    def _handle_of(self, rank: int) -> bytes:
        try:
            self._store.wait([_key(rank)], self._timeout)
            return bytes.fromhex(self._store.get(_key(rank)).decode())
        except RuntimeError as error:
            raise RankLost(f"rank {rank} has taken no KV cache: {error}") from error


def _key(rank: int) -> str:
    return f"pool of rank {rank}"


class CudaMemory:
    """Implements ShareableMemory. What is reached costs a context, some 0.5 GB of each GPU."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime

    def reach(self, device: str) -> None:
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceError(str(error)) from error

    def allocate(self, num_bytes: int, device: str) -> tuple[Tensor, bytes]:
        with torch.cuda.device(device):
            memory = _Memory(self._runtime.allocate(num_bytes), num_bytes)
            handle = self._runtime.handle(memory.address)
        weakref.finalize(memory, self._runtime.free, memory.address).atexit = False
        return _tensor(memory, device), handle

    def open(self, handle: bytes, num_bytes: int, device: str) -> Tensor:
        with torch.cuda.device(device):
            memory = _Memory(self._runtime.open(handle), num_bytes)
        weakref.finalize(memory, self._runtime.close, memory.address).atexit = False
        return _tensor(memory, device)


class _Memory:
    """Bytes on a GPU, as torch takes them from others: a tensor over them keeps this."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address = address
        self._num_bytes = num_bytes

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        return {
            "shape": (self._num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),  # may be written
            "strides": None,
            "version": 3,
        }


def _tensor(memory: _Memory, device: str) -> Tensor:
    return torch.as_tensor(memory, device=device)
