"""The probes of what a GPU's system lets processes do; CUDA and NCCL are stand-ins."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gpu_stages import probes, rank_handoff
from gpu_stages.items import InapplicableError
from gpu_stages.scale import TINY


class Graph:
    """Replays an addition to the tensor that it was captured with."""

    def __init__(self) -> None:
        self.is_alive = True
        self.replayed: list[Tensor] = []

    def replay(self) -> None:
        for total in self.replayed:
            total.fill_(3)

    def reset(self) -> None:
        self.is_alive = False


class Group:
    """Hears of its end, as NCCL's groups do, which then wait for graphs for ever."""

    def __init__(self, graphs: list[Graph], graphs_at_end: list[bool]) -> None:
        self._graphs = graphs
        self._graphs_at_end = graphs_at_end

    def all_reduce(self, x: Tensor) -> Tensor:
        self._graphs[-1].replayed.append(x)
        return x

    def __del__(self) -> None:
        self._graphs_at_end += [graph.is_alive for graph in self._graphs]


def test_workers_of_two_ranks_need_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InapplicableError, match="fewer than 2 GPUs, and each rank takes one"):
        next(rank_handoff.measure(replace(TINY, device="cuda")))


def test_a_group_ends_behind_the_graphs_that_hold_its_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs: list[Graph] = []
    graphs_at_end: list[bool] = []

    def new_graph() -> Graph:
        graphs.append(Graph())
        return graphs[-1]

    @contextmanager
    def capture(graph: Graph, *, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # threads of NCCL ask CUDA meanwhile
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(probes, "join_group", lambda *_, **__: Group(graphs, graphs_at_end))
    make_zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda count, **_: make_zeros(count))
    (_, item) = probes.items(replace(TINY, device="cuda"))
    (measurement,) = item.measure()
    assert measurement.passed
    assert graphs_at_end == [False]
