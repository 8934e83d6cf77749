"""The page pools of the ranks of one worker, all of which rank 0 reaches."""

from typing import Protocol

from torch import Tensor


class RankPools(Protocol):
    """One rank's way to the pools. They are of one size and have pages of the same numbers."""

    def pool(self, rank: int, num_bytes: int) -> Tensor:
        """The pool of `rank`, uint8 [num_bytes], mapped as long as its tensor lives.

        Every rank asks for its own once; rank 0 for those of the others, after its own. Raises
        EngineError where there is no such memory, and RankLost when its rank takes none.
        """
