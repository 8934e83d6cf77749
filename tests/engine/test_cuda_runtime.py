"""What is asked of CUDA's runtime, as C passes it; the library is a stand-in in host memory."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pagewire.engine.cuda_runtime import HANDLE_BYTES, CudaRuntime
from pagewire.engine.errors import DeviceError

OUT_OF_MEMORY = 2
BY_ADDRESS = 4
MAX_BYTES = 1 << 20
Address, Size, Status = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
Out = ctypes.POINTER(Address)


class Handle(ctypes.Structure):
    _fields_ = (("value", ctypes.c_ubyte * HANDLE_BYTES),)


class Library:
    """Knows what is allocated and opened. A handle is an address behind zeros."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.opened: list[int] = []
        self.streams: list[int] = []

    def malloc(self, out: Any, num_bytes: int) -> int:
        if num_bytes > MAX_BYTES:
            return OUT_OF_MEMORY
        block = ctypes.create_string_buffer(num_bytes)
        out[0] = ctypes.addressof(block)
        self.blocks[ctypes.addressof(block)] = block
        return 0

    def free(self, address: int) -> int:
        return 0 if self.blocks.pop(address, None) is not None else 1

    def get_handle(self, out: Any, address: int) -> int:
        out[0].value[:] = address.to_bytes(HANDLE_BYTES, "big")
        return 0

    def open_handle(self, out: Any, handle: Handle, flags: int) -> int:
        assert flags == 1  # cudaIpcMemLazyEnablePeerAccess
        out[0] = int.from_bytes(bytes(handle.value), "big")
        self.opened.append(out[0])
        return 0

    def close_handle(self, address: int) -> int:
        self.opened.remove(address)
        return 0

    def copy_rows(
        self,
        into: int,
        into_pitch: int,
        source: int,
        source_pitch: int,
        row_bytes: int,
        num_rows: int,
        kind: int,
        stream: int,
    ) -> int:
        assert kind == BY_ADDRESS
        self.streams.append(stream)
        for row in range(num_rows):
            ctypes.memmove(into + row * into_pitch, source + row * source_pitch, row_bytes)
        return 0

    def functions(self) -> SimpleNamespace:
        """As ctypes finds them in a library."""

        def c(function: Any, *types: Any) -> Any:
            return ctypes.CFUNCTYPE(Status, *types)(function)

        return SimpleNamespace(
            cudaGetErrorString=lambda status: b"out of memory" if status == 2 else b"bad",
            cudaMalloc=c(self.malloc, Out, Size),
            cudaFree=c(self.free, Address),
            cudaIpcGetMemHandle=c(self.get_handle, ctypes.POINTER(Handle), Address),
            cudaIpcOpenMemHandle=c(self.open_handle, Out, Handle, ctypes.c_uint),
            cudaIpcCloseMemHandle=c(self.close_handle, Address),
            cudaMemcpy2DAsync=c(
                self.copy_rows, *(Address, Size, Address, Size, Size, Size, Status, Address)
            ),
        )


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def runtime(library: Library) -> CudaRuntime:
    return CudaRuntime(library.functions())


def test_memory_is_shared_by_a_handle_of_64_bytes(library: Library, runtime: CudaRuntime) -> None:
    address = runtime.allocate(100)
    handle = runtime.handle(address)
    assert len(handle) == 64  # zeros among them, which end a string of C
    assert runtime.open(handle) == address
    assert library.opened == [address]
    runtime.close(address)
    runtime.free(address)
    assert not library.opened and not library.blocks


def test_rows_are_copied_from_one_pitch_to_another(library: Library, runtime: CudaRuntime) -> None:
    source = torch.arange(24, dtype=torch.uint8).view(4, 6)[:, 1:4]
    into = torch.zeros(4, 5, dtype=torch.uint8)[:, :3]
    runtime.copy_rows(
        *(into.data_ptr(), into.stride(0), source.data_ptr(), source.stride(0)),
        row_bytes=3,
        num_rows=4,
        stream=77,
    )
    assert torch.equal(into, source)
    assert library.streams == [77]


def test_what_cuda_refuses_is_said_in_its_words(runtime: CudaRuntime) -> None:
    with pytest.raises(DeviceError, match="cudaMalloc failed with status 2: out of memory"):
        runtime.allocate(MAX_BYTES + 1)
    with pytest.raises(DeviceError, match="cudaFree failed with status 1: bad"):
        runtime.free(8)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "built for the CPU only"),
        ("99.1", r"built for CUDA 99.1, has not loaded libcudart.so.99 .* tensor_parallel_size"),
    ],
)
def test_a_torch_without_the_runtime_is_named(
    version: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(DeviceError, match=message):
        CudaRuntime.of_torch()
