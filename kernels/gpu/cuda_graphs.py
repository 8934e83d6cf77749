"""Captures steps as CUDA graphs. Needs a GPU: all else about recordings is tested without."""

from collections.abc import Callable
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
        """Capture a step that has run before, so that its kernels are compiled and loaded.

        Raises NotRecordableError for a step that waits for the device, and RuntimeError for other
        failures of CUDA.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device meanwhile.
        captured = torch.cuda.graph(
            graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with torch.cuda.device(self._device), captured:
                output = step()
        except torch.AcceleratorError as error:
            if "captur" not in str(error):
                raise
            raise NotRecordableError("a step that waits for the GPU") from error
        return CudaGraph(graph=graph, output=output, step=step)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CudaGraph:
    """Implements `pagewire.kernels.ops.Recording`, on the stream that is current at a replay."""

    graph: torch.cuda.CUDAGraph
    output: Tensor
    step: Callable[[], Tensor]  # holds the tensors whose addresses were captured

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output
