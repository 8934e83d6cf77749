"""What a GPU's system lets processes do: share memory over CUDA IPC, and NCCL inside a graph."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__

from gpu_stages.items import InapplicableError, Item
from gpu_stages.measurement import Measurement
from gpu_stages.scale import Scale
from gpu_stages.timing import REPEATS, median_ms, wall_ms
from pagewire.engine.cuda_copy_stream import CudaCopyStream
from pagewire.engine.cuda_runtime import CudaRuntime
from pagewire.engine.parallel.gpu_pools import CudaMemory
from pagewire.engine.parallel.process_group import join_group

_DEVICE = "cuda:0"
_SHARED_BYTES = 256 << 20
_ROW_BYTES = 64 << 10  # of a layer of a page, what one of so many ranks has
_NUM_RANKS = 4
_WRITTEN, _ANSWER = 37, 73
_CHILD_S = 40.0


def items(scale: Scale) -> Iterator[Item]:
    yield Item(name="CUDA IPC", measure=lambda: _ipc(scale))
    yield Item(name="NCCL in a graph", measure=lambda: _nccl(scale))


def _ipc(scale: Scale) -> Iterator[Measurement]:
    """Another process reads what this one wrote, copies it, and writes back.

    As rank 0 of a worker does with the pages of the others.
    """
    if scale.device == "cpu":
        raise InapplicableError("memory of the host needs no CUDA IPC")
    shared, handle = CudaMemory(CudaRuntime.of_torch()).allocate(_SHARED_BYTES, _DEVICE)
    shared.fill_(_WRITTEN)
    torch.cuda.synchronize()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run(
        [sys.executable, "-m", "gpu_stages.probes", handle.hex()],
        env=environment,
        timeout=_CHILD_S,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    yield Measurement(
        name="CUDA IPC: bytes that another process wrote otherwise",
        value=float((shared != _ANSWER).sum()),
        unit="",
        limit=0.0,
    )
    copy_ms, rows_ms = map(float, child.stdout.split())
    yield Measurement(
        name="CUDA IPC: copy from another process",
        value=2 * _SHARED_BYTES / copy_ms / 1e6,
        unit="GB/s",
    )
    yield Measurement(
        name="CUDA IPC: one rank's rows of another process to host memory",
        value=_SHARED_BYTES / rows_ms / 1e6,
        unit="GB/s",
    )


def _answer(handle: str) -> None:
    """The other process: see that the bytes are there, time copies of them and write others."""
    runtime = CudaRuntime.of_torch()
    theirs = CudaMemory(runtime).open(bytes.fromhex(handle), _SHARED_BYTES, _DEVICE)
    if bool((theirs != _WRITTEN).any()):
        sys.exit("the memory holds other bytes than were written")
    mine = torch.empty_like(theirs)
    copy_ms = median_ms([lambda: mine.copy_(theirs)], "cuda")
    print(copy_ms, _time_rows(CudaCopyStream(_DEVICE, runtime), theirs))
    theirs.fill_(_ANSWER)
    torch.cuda.synchronize()


def _time_rows(copies: CudaCopyStream, theirs: torch.Tensor) -> float:
    """Milliseconds to bring rows that follow one another to where they lie apart on the host."""
    source = theirs.view(-1, _ROW_BYTES)
    payloads = copies.host_memory(_NUM_RANKS * _SHARED_BYTES).view(len(source), -1).zero_()
    into = payloads[:, _ROW_BYTES : 2 * _ROW_BYTES]

    def copy() -> None:
        copies.begin(partial(copies.copy_rows, into, source)).wait()

    time_ms = wall_ms(copy, "cuda", REPEATS)
    if bool((into != _WRITTEN).any()) or int((payloads != 0).sum()) != _SHARED_BYTES:
        sys.exit("rows were copied to other places, or other bytes")
    return time_ms


def _nccl(scale: Scale) -> Iterator[Measurement]:
    """A group of one rank, for there may be one GPU: what it does with a graph is as of more."""
    if scale.device == "cpu":
        raise InapplicableError("ranks on a CPU sum over gloo, and record nothing")
    group = join_group(HashStore(), 0, 1, device=scale.device)
    x = torch.zeros(1 << 20, device=scale.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        total = group.all_reduce(x + 1)
    x.fill_(2)
    graph.replay()
    num_wrong = float((total != 3).sum())
    graph.reset()  # a group that ends waits for the end of all graphs that hold calls of it
    yield Measurement(name="NCCL in a graph: wrong sums", value=num_wrong, unit="", limit=0.0)


if __name__ == "__main__":
    _answer(sys.argv[1])
