"""What a GPU's system lets processes do: share memory over CUDA IPC, and NCCL inside a graph."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__

from gpu_stages.items import InapplicableError, Item
from gpu_stages.measurement import Measurement
from gpu_stages.scale import Scale
from gpu_stages.timing import median_ms
from pagewire.engine.parallel.process_group import join_group

_SHARED_BYTES = 256 << 20
_WRITTEN, _ANSWER = 37, 73
_CHILD_S = 40.0


def items(scale: Scale) -> Iterator[Item]:
    yield Item(name="CUDA IPC", measure=lambda: _ipc(scale))
    yield Item(name="NCCL in a graph", measure=lambda: _nccl(scale))


def _ipc(scale: Scale) -> Iterator[Measurement]:
    """Another process reads what this one wrote, copies it, and writes back."""
    if scale.device == "cpu":
        raise InapplicableError("memory of the host needs no CUDA IPC")
    shared = torch.full((_SHARED_BYTES,), _WRITTEN, dtype=torch.uint8, device=scale.device)
    torch.cuda.synchronize()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run(
        [sys.executable, "-m", "gpu_stages.probes", handle_of(shared)],
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
    copy_ms = float(child.stdout)
    yield Measurement(
        name="CUDA IPC: copy from another process",
        value=2 * _SHARED_BYTES / copy_ms / 1e6,
        unit="GB/s",
    )


def handle_of(tensor: torch.Tensor) -> str:
    """What another process needs to open the memory of `tensor`, as JSON."""
    storage: Any = tensor.untyped_storage()  # without type information
    return json.dumps(
        [part.hex() if isinstance(part, bytes) else part for part in storage._share_cuda_()]
    )


def _open(handle: str) -> torch.Tensor:
    """uint8, the memory of another process."""
    storage: Any = torch.UntypedStorage
    parts = [bytes.fromhex(part) if isinstance(part, str) else part for part in json.loads(handle)]
    torch.cuda.synchronize()  # starts CUDA in this process
    opened = storage._new_shared_cuda(*parts)
    return torch.empty(0, dtype=torch.uint8, device=opened.device).set_(opened)


def _answer(handle: str) -> None:
    """The other process: see that the bytes are there, time a copy of them and write others."""
    theirs = _open(handle)
    if bool((theirs != _WRITTEN).any()):
        sys.exit("the memory holds other bytes than were written")
    mine = torch.empty_like(theirs)
    print(median_ms([lambda: mine.copy_(theirs)], "cuda"))
    theirs.fill_(_ANSWER)
    torch.cuda.synchronize()


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
