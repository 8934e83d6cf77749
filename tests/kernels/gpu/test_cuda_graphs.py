"""CUDA graphs on a GPU: what a replay computes, and which steps cannot be captured."""

import pytest
import torch

from pagewire.kernels.gpu.cuda_graphs import CudaGraphs
from pagewire.kernels.ops import NotRecordableError

pytestmark = pytest.mark.gpu


def test_a_replay_reads_what_its_inputs_hold_now() -> None:
    graphs = CudaGraphs("cuda")
    x = torch.ones(4, device="cuda")
    recordings = [graphs.capture(lambda n=n: x * n) for n in (3, 2)]  # type: ignore[misc]
    x.fill_(5)
    assert recordings[0].replay().tolist() == [15.0] * 4
    assert recordings[1].replay().tolist() == [10.0] * 4


def test_a_step_that_waits_for_the_device_is_refused_and_the_next_is_not() -> None:
    graphs = CudaGraphs("cuda")
    x = torch.ones(4, device="cuda")
    with pytest.raises(NotRecordableError, match="waits for the GPU"):
        graphs.capture(lambda: x * x.sum().item())
    assert graphs.capture(lambda: x + 1).replay().tolist() == [2.0] * 4
