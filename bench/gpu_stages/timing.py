"""How long work on a device takes: the median of repeats, on a GPU as a graph without the host."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

REPEATS = 11


def median_ms(calls: Sequence[Callable[[], object]], device: str) -> float:
    """Of one call. `calls` do the same on memory of their own, so that no cache holds all of it."""
    if device != "cuda":
        return wall_ms(_in_turn(calls), device, 1) / len(calls)
    _in_turn(calls)()  # what a first call compiles and loads cannot be captured
    return wall_ms(_replay(calls), device, REPEATS) / len(calls)


def wall_ms(run: Callable[[], object], device: str, repeats: int) -> float:
    """The median time until what `run` began has ended, by the host's clock."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _replay(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
