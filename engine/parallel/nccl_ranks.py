"""What makes a group of ranks over NCCL: one GPU for each, all of one machine.

The only module of the engine that calls NCCL; the group's operations are those of `process_group`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from pagewire.engine.errors import EngineError

_REMEDY = "set tensor_parallel_size to 1, or device to cpu"


def rank_device(device: str, rank: int) -> str:
    """The device of a rank: GPUs that follow one another from `device` on; all share a CPU."""
    first = torch.device(device)
    return f"cuda:{(first.index or 0) + rank}" if first.type == "cuda" else device


def require_gpus(device: str, size: int) -> None:
    """Raise EngineError, with a remedy, unless NCCL can join so many GPUs from `device` on."""
    wanted = f"tensor_parallel_size is {size} on device {device}"
    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        raise EngineError(f"{wanted}, and this build of torch has no NCCL; {_REMEDY}")
    first, found = torch.device(device).index or 0, torch.cuda.device_count()
    if found < first + size:
        raise EngineError(
            f"{wanted}, which takes GPUs {first} to {first + size - 1}, and torch finds {found}; "
            f"{_REMEDY}, and see CUDA_VISIBLE_DEVICES"
        )


def new_group(store: Store, rank: int, size: int, device: str, timeout: timedelta) -> Any:
    """torch's group, whose communicator is made by its first operation.

    From then on operations of this thread are for `device`. Raises RuntimeError.
    """
    nccl: Any = torch.distributed.ProcessGroupNCCL  # without type information
    torch.cuda.set_device(device)
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, rank, size, options)


@contextmanager
def patience(group: Any, timeout: timedelta) -> Iterator[None]:
    """Operations of the block may take so long: NCCL goes by the time of its group alone."""
    usual = group.options._timeout
    group._set_default_timeout(timeout)
    try:
        yield
    finally:
        group._set_default_timeout(usual)


def wait_for(result: Tensor) -> None:
    """Until the GPU has computed it: the host may be far ahead."""
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
