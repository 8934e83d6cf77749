"""What a capture asks of CUDA, and in which order; torch's graphs and streams are stand-ins."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pagewire.kernels.gpu.cuda_graphs import CudaGraphs
from pagewire.kernels.ops import NotRecordableError

Calls = list[str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Of CUDA, each with what surrounds it."""
    made: Calls = []
    modes = ["default"]

    def set_mode(mode: str) -> None:
        if len(modes) == 1:  # as torch does, once in a process
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        modes.append(mode)
        made.append(f"mode {mode}")

    @contextmanager
    def within(name: str) -> Iterator[None]:
        made.append(f"enter {name}")
        yield
        made.append(f"leave {name}")

    def capture(graph: object, **options: object) -> AbstractContextManager[None]:
        assert options["capture_error_mode"] == "thread_local"  # other threads use CUDA meanwhile
        return within("capture")

    stream = SimpleNamespace(wait_stream=lambda other: made.append(f"wait for {other}"))
    for name, stand_in in {
        "Stream": lambda device: stream,
        "graph_pool_handle": lambda: "pool",
        "device": lambda device: within("device"),
        "current_stream": lambda: "steps",
        "stream": lambda _: within("stream"),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: made.append("replay")),
        "graph": capture,
        "get_sync_debug_mode": lambda: modes[-1],
        "set_sync_debug_mode": set_mode,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


def test_a_step_is_run_where_waiting_is_forbidden_and_then_captured(calls: Calls) -> None:
    def step() -> Tensor:
        calls.append("step")
        return torch.ones(1)

    graph = CudaGraphs("cuda").capture(step)
    assert graph.replay() is graph.output
    assert calls == [
        "enter device",
        "wait for steps",
        "enter stream",
        "mode error",
        "step",
        "mode default",
        "leave stream",
        "enter capture",
        "step",
        "leave capture",
        "leave device",
        "replay",
    ]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("called a synchronizing CUDA operation", NotRecordableError),
        ("CUDA out of memory", RuntimeError),
    ],
)
def test_a_step_that_raises_is_not_captured(
    message: str, error: type[Exception], calls: Calls
) -> None:
    def step() -> Tensor:
        raise RuntimeError(message)

    with pytest.raises(error):
        CudaGraphs("cuda").capture(step)
    assert "enter capture" not in calls
    assert calls[-1] == "mode default"  # the process goes on as before
