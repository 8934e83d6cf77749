"""Pools of ranks on GPUs: who allocates, who opens, and what is said when one cannot."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__

from pagewire.engine.errors import DeviceError, EngineError
from pagewire.engine.parallel.gpu_pools import GpuPools
from pagewire.engine.parallel.rank_group import RankLost

NUM_BYTES = 1000
HANDLE_BYTES = 64
EXCLUSIVE = "cuda:9"


class Memory:
    """Implements ShareableMemory for ranks in one process: GPUs of the host's memory."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.opened: list[str] = []
        self._allocated: dict[bytes, tuple[Tensor, str]] = {}

    def reach(self, device: str) -> None:
        if device == EXCLUSIVE:
            raise DeviceError("all CUDA-capable devices are busy or unavailable")
        self.reached.append(device)

    def allocate(self, num_bytes: int, device: str) -> tuple[Tensor, bytes]:
        if num_bytes > NUM_BYTES:
            raise DeviceError("cudaMalloc failed with status 2: out of memory")
        memory = torch.zeros(num_bytes, dtype=torch.uint8)
        handle = len(self._allocated).to_bytes(HANDLE_BYTES, "big")
        self._allocated[handle] = memory, device
        return memory, handle

    def open(self, handle: bytes, num_bytes: int, device: str) -> Tensor:
        memory, home = self._allocated[handle]
        assert (len(memory), home) == (num_bytes, device)
        self.opened.append(device)
        return memory


def test_rank_0_reaches_the_pools_of_all() -> None:
    store, memory = HashStore(), Memory()
    pools = [GpuPools(store, rank, "cuda", memory) for rank in range(3)]
    pools[0].reach(3)
    with ThreadPoolExecutor(3) as threads:  # in any order
        mine = list(threads.map(lambda rank: pools[rank].pool(rank, NUM_BYTES), range(3)))
    theirs = [pools[0].pool(rank, NUM_BYTES) for rank in (1, 2)]
    assert memory.reached == ["cuda:0", "cuda:1", "cuda:2"]
    assert memory.opened == ["cuda:1", "cuda:2"]
    for number, (pool, seen) in enumerate(zip(mine[1:], theirs, strict=True), start=1):
        pool.fill_(number)
        assert seen.eq(number).all()
    assert not mine[0].any()


def test_a_pool_that_does_not_fit_says_whose_and_where() -> None:
    pools = GpuPools(HashStore(), 1, "cuda:4", Memory())
    with pytest.raises(EngineError, match=r"of rank 1 on cuda:5: cudaMalloc .* lower num_pages"):
        pools.pool(1, NUM_BYTES + 1)


def test_a_gpu_for_one_process_alone_says_so() -> None:
    pools = GpuPools(HashStore(), 0, "cuda:8", Memory())
    with pytest.raises(EngineError, match=r"rank 1 and cannot use cuda:9 .* compute mode"):
        pools.reach(2)


def test_a_rank_that_takes_no_pool_is_lost() -> None:
    pools = GpuPools(HashStore(), 0, "cuda", Memory(), timeout=timedelta(milliseconds=50))
    with pytest.raises(RankLost, match="rank 1 has taken no KV cache"):
        pools.pool(1, NUM_BYTES)
