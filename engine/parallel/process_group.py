"""Ranks in processes of their own, over torch.distributed: gloo in host memory, NCCL between GPUs.

The process group is made by hand: torch's own functions keep one default group per process, and a
worker may have others. On a GPU sums are made on the stream that computes, so that a CUDA graph can
hold them, and the host waits for none.
"""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import AllreduceOptions, BroadcastOptions, GatherOptions, ReduceOp
from torch.distributed.distributed_c10d import Store

from pagewire.engine.parallel.nccl_ranks import (
    new_group,
    patience,
    rank_device,
    require_gpus,
    wait_for,
)
from pagewire.engine.parallel.rank_group import RankLost, split_evenly

_LOOPBACK = "127.0.0.1"  # the ranks of a worker are on one machine
_STEP_TIMEOUT = timedelta(seconds=60)
_LOAD_TIMEOUT = timedelta(minutes=30)  # between ranks that load large weights from slow disks


class ProcessGroup:
    """Implements RankGroup."""

    def __init__(self, group: Any, device: str, *, in_rank_order: bool) -> None:
        """`group`: torch's, whose type information leaves out what is used here.

        With `in_rank_order` sums are made from rank 0 on. Otherwise the order may depend on where
        in a tensor an element lies, and so on the batch.
        """
        self._group = group
        self._device = device
        self._in_rank_order = in_rank_order
        self.rank: int = group.rank()
        self.size: int = group.size()

    @property
    def is_recordable(self) -> bool:
        return torch.device(self._device).type == "cuda"

    def connect(self) -> None:
        """Make each kind of call once: in a graph no connection can be made."""
        self.all_reduce(torch.zeros(1, device=self._device))
        self.gather_columns(torch.zeros((1, 1), device=self._device), self.size)
        self.broadcast(torch.zeros(1, device=self._device))
        self.barrier()

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self._in_rank_order:
            return self._sum_in_rank_order(x)
        options = AllreduceOptions()
        options.asyncOp = False  # on the stream that is current, not on one of the group's
        self._run(lambda: self._group.allreduce([x], options))
        return x

    def gather_columns(self, x: Tensor, num_columns: int) -> Tensor:
        share = len(split_evenly(num_columns, self.size, 0))
        missing = share - x.shape[1]
        padded = F.pad(x, (0, missing)) if missing else x.contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else []
        options = GatherOptions()
        options.rootRank = 0
        self._run(lambda: self._group.gather([parts] if parts else [], [padded], options))
        return torch.cat(parts, dim=1)[:, :num_columns].contiguous() if parts else x

    def broadcast(self, x: Tensor) -> Tensor:
        options = BroadcastOptions()
        options.rootRank = 0
        options.asyncOp = False
        self._run(lambda: self._group.broadcast([x], options))
        return x

    def barrier(self) -> None:
        wait_for(self.all_reduce(torch.zeros(1, device=self._device)))

    def least(self, value: int) -> int:
        values = torch.tensor([value], device=self._device)
        options = AllreduceOptions()
        options.reduceOp = ReduceOp(ReduceOp.MIN)
        options.timeout = _LOAD_TIMEOUT
        on_gpus = self.is_recordable
        with patience(self._group, _LOAD_TIMEOUT) if on_gpus else nullcontext():
            self._run(lambda: self._group.allreduce([values], options))
            return int(values)  # waits for the device

    def abort(self) -> None:
        """On a CPU operations end by themselves, since a connection has ended."""
        if self.is_recordable:
            self._group.abort()

    def _sum_in_rank_order(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._run(lambda: self._group.allgather([parts], [x]))
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def _run(self, operation: Callable[[], Any]) -> None:
        try:
            work = operation()
            if work is not None:  # else it is on the stream
                work.wait()
        except RuntimeError as error:
            raise RankLost(
                f"rank {self.rank} of {self.size} waits for the others in vain: {error}"
            ) from error


def join_group(
    store: Store,
    rank: int,
    size: int,
    *,
    device: str = "cpu",
    in_rank_order: bool = False,
    timeout: timedelta = _STEP_TIMEOUT,
) -> ProcessGroup:
    """Join the group of those who call this with the same store and device, once each.

    `device`: that of rank 0, whose GPU the others' follow; see `rank_device`. `timeout`: for the
    slowest rank to come, and in the middle of a step; between GPUs a step that takes longer ends
    the process. Raises RankLost when the others do not come, and EngineError where there is no NCCL
    or there are too few GPUs.
    """
    on_gpus = torch.device(device).type == "cuda"
    if on_gpus:
        require_gpus(device, size)
    own_device = rank_device(device, rank)
    try:
        if on_gpus:
            group = new_group(store, rank, size, own_device, timeout)
        else:
            group = _gloo_group(store, rank, size, timeout)
    except (AttributeError, RuntimeError) as error:  # AttributeError: torch was built without
        raise RankLost(f"rank {rank} of {size} cannot join its group: {error}") from error
    joined = ProcessGroup(group, own_device, in_rank_order=in_rank_order)
    if on_gpus:
        joined.connect()
    return joined


def _gloo_group(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    gloo: Any = torch.distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=_LOOPBACK, lazy_init=False)]
    options._timeout = timeout
    options._threads = 1  # one operation at a time
    return gloo(store, rank, size, options)
