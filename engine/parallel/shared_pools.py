"""The page pools of the ranks on one host, in memory that all of them share.

So rank 0 alone sends and receives frames: it reaches the KV heads of every rank where they are.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from pagewire.engine.errors import EngineError
from pagewire.engine.kv_cache import in_huge_pages


class SharedPools:
    """Implements RankPools, the pools behind one another in anonymous memory that has no name.

    Every rank has a SharedPools with the same descriptor.
    """

    def __init__(self, descriptor: int, num_ranks: int) -> None:
        """`descriptor`: of `shared_memory`, inherited from the process that made it."""
        self._descriptor = descriptor
        self._num_ranks = num_ranks

    def pool(self, rank: int, num_bytes: int) -> Tensor:
        """Any number of times. Raises OSError."""
        stride = -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self._descriptor, self._num_ranks * stride)
        return in_huge_pages(mmap.mmap(self._descriptor, num_bytes, offset=rank * stride))


@contextmanager
def shared_memory() -> Iterator[int]:
    """The descriptor of anonymous shared memory, still empty.

    Raises EngineError where there is none.
    """
    try:
        descriptor = os.memfd_create("pagewire-pools")
    except (AttributeError, OSError) as error:
        raise EngineError(
            f"this system has no anonymous shared memory ({error}); set tensor_parallel_size to 1"
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
