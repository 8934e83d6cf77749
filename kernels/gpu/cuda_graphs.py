"""Captures steps as CUDA graphs. Needs a GPU: all else about recordings is tested without."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.kernels.ops import NotRecordableError


class CudaGraphs:
    """Captures graphs that share the memory of what they compute in between.

    So none may run beside another. Captured largest first, they take little more than the largest.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, step: Callable[[], Tensor]) -> "CudaGraph":
        """Run a step twice: to see that it can be captured and, without effect, for its capture.

        Meanwhile no other thread may wait for the device. Raises NotRecordableError for a step that
        waits for it, and RuntimeError for other failures of CUDA.
        """
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                _run_without_waiting(step)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
            ):
                output = step()
        return CudaGraph(graph=graph, output=output, step=step)


def _run_without_waiting(step: Callable[[], Tensor]) -> None:
    """Raise NotRecordableError where the host waits: a capture that fails leaves torch unusable."""
    try:
        with _waiting_forbidden():
            step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise NotRecordableError("a step that waits for the GPU") from error


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """Within it torch raises RuntimeError where the host would wait for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # It does not see every wait; those of our steps it does.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CudaGraph:
    """Implements `pagewire.kernels.ops.Recording`, on the stream that is current at a replay."""

    graph: torch.cuda.CUDAGraph
    output: Tensor
    step: Callable[[], Tensor]  # holds the tensors whose addresses were captured

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output
