"""Copies beside the steps of a GPU, in a CUDA stream of their own.

The only lines of the hand-off that need CUDA: what is copied, when and how often, is tested
without.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.engine.copy_stream import Completion
from pagewire.engine.cuda_runtime import CudaRuntime


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CudaCompletion:
    """Implements `pagewire.engine.copy_stream.Completion`."""

    event: torch.cuda.Event

    @classmethod
    def of(cls, stream: torch.cuda.Stream) -> "CudaCompletion":
        """Of what `stream` has been told so far. A thread that waits for it sleeps."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return cls(event=event)

    def wait(self) -> None:
        self.event.synchronize()

    def hold_back(self) -> None:
        self.event.wait()


class CudaCopyStream:
    """Implements `pagewire.engine.copy_stream.CopyStream`.

    torch's streams do not wait for the default stream, in which steps run, nor it for them.
    """

    def __init__(self, device: str, runtime: CudaRuntime | None = None) -> None:
        """`device` as torch names it. `runtime`: to copy rows that lie apart, which torch does by
        way of other memory, in which the host would read too early; None: there are none.

        Raises RuntimeError where there is no such GPU.
        """
        self._device = device
        self._runtime = runtime
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def device_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def lend(self, data: Tensor) -> Tensor:
        return data

    def copy_rows(self, into: Tensor, source: Tensor) -> None:
        if into.is_contiguous() and source.is_contiguous():
            into.copy_(source, non_blocking=True)
            return
        assert self._runtime is not None, "rows of one of several ranks lie apart"
        num_rows, row_bytes = into.shape
        self._runtime.copy_rows(
            *(into.data_ptr(), into.stride(0), source.data_ptr(), source.stride(0)),
            row_bytes=row_bytes,
            num_rows=num_rows,
            stream=self._stream.cuda_stream,
        )

    def prepare_checksums(self) -> None:
        with torch.cuda.stream(self._stream):
            data = torch.zeros(16, dtype=torch.uint8, device=self._device)
            total = torch.zeros(1, dtype=torch.int64, device=self._device)
            self.begin_checksum(data, total)

    def begin_checksum(self, data: Tensor, total: Tensor) -> None:
        # Triton is not there on every machine that has this module.
        from pagewire.kernels.gpu.page_checksum import begin_checksum

        begin_checksum(data, total)

    def mark(self) -> CudaCompletion:
        return CudaCompletion.of(torch.cuda.current_stream(self._device))

    def begin(self, work: Callable[[], None], *, after: Completion | None = None) -> CudaCompletion:
        with torch.cuda.stream(self._stream):
            if after is not None:
                after.hold_back()
            work()
        return CudaCompletion.of(self._stream)
