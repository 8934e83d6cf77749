"""The functions of the CUDA runtime that torch does not pass on, in the library that it has loaded.

They share memory between processes, and copy rows that lie apart on either side.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from pagewire.engine.errors import DeviceError

HANDLE_BYTES = 64

_OPEN_LAZILY = 1  # cudaIpcMemLazyEnablePeerAccess: the only flag that there is
_COPY_BY_ADDRESS = 4  # cudaMemcpyDefault: an address says whose memory it is


class _IpcHandle(ctypes.Structure):
    """cudaIpcMemHandle_t, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


_ADDRESS, _SIZE, _STATUS = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {
    "cudaMalloc": (ctypes.POINTER(_ADDRESS), _SIZE),
    "cudaFree": (_ADDRESS,),
    "cudaIpcGetMemHandle": (ctypes.POINTER(_IpcHandle), _ADDRESS),
    "cudaIpcOpenMemHandle": (ctypes.POINTER(_ADDRESS), _IpcHandle, ctypes.c_uint),
    "cudaIpcCloseMemHandle": (_ADDRESS,),
    "cudaMemcpy2DAsync": (_ADDRESS, _SIZE, _ADDRESS, _SIZE, _SIZE, _SIZE, ctypes.c_int, _ADDRESS),
}


class CudaRuntime:
    """Acts on the GPU that is current in torch. Every call raises DeviceError when CUDA refuses."""

    def __init__(self, library: Any) -> None:
        """`library` has the functions, as ctypes calls them."""
        self._describe = library.cudaGetErrorString
        self._describe.argtypes, self._describe.restype = (_STATUS,), ctypes.c_char_p
        self._functions = {name: getattr(library, name) for name in _ARGUMENTS}
        for name, function in self._functions.items():
            function.argtypes, function.restype = _ARGUMENTS[name], _STATUS

    @classmethod
    def of_torch(cls) -> "CudaRuntime":
        """Raises DeviceError where torch has loaded none."""
        if torch.version.cuda is None:
            raise DeviceError("this torch is built for the CPU only, and has no CUDA runtime")
        name = f"libcudart.so.{torch.version.cuda.partition('.')[0]}"
        try:
            return cls(ctypes.CDLL(name))  # found by its name, wherever torch has loaded it from
        except OSError as error:
            raise DeviceError(
                f"torch, built for CUDA {torch.version.cuda}, has not loaded {name} ({error}); "
                "several ranks need a torch with a shared CUDA runtime: set tensor_parallel_size "
                "to 1, or device to cpu"
            ) from error

    def allocate(self, num_bytes: int) -> int:
        """The address of memory of its own, which nobody else has a part of."""
        address = _ADDRESS()
        self._call("cudaMalloc", ctypes.byref(address), num_bytes)
        return address.value or 0

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def handle(self, address: int) -> bytes:
        """What another process opens the memory with that `allocate` returned."""
        handle = _IpcHandle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """The address of another process's memory here; once for each handle."""
        address = _ADDRESS()
        theirs = _IpcHandle.from_buffer_copy(handle)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), theirs, _OPEN_LAZILY)
        return address.value or 0

    def close(self, address: int) -> None:
        """Give back what `open` returned."""
        self._call("cudaIpcCloseMemHandle", address)

    def copy_rows(
        self,
        into: int,
        into_pitch: int,
        source: int,
        source_pitch: int,
        *,
        row_bytes: int,
        num_rows: int,
        stream: int,
    ) -> None:
        """Begin to copy rows that begin a pitch behind one another, by one order of `stream`."""
        self._call(
            "cudaMemcpy2DAsync",
            *(into, into_pitch, source, source_pitch, row_bytes, num_rows),
            *(_COPY_BY_ADDRESS, stream),
        )

    def _call(self, name: str, *arguments: Any) -> None:
        status = self._functions[name](*arguments)
        if status:
            reason = (self._describe(status) or b"unknown error").decode()
            raise DeviceError(f"{name} failed with status {status}: {reason}")
