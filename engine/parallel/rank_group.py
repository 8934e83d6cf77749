"""The ranks that compute one model together, as the model sees them.

Tensor parallelism as in Megatron-LM (Shoeybi et al., 2019): every rank has some heads, some
features of the MLP and some rows of the LM head, and the parts of a layer's output are summed
twice, behind attention and behind the MLP.
"""

from typing import Protocol

from torch import Tensor


class RankLost(Exception):
    """A rank of the group has ended, hangs or is out of step: the group cannot go on.

    Not a RuntimeError, which a step may raise because of one row: this is nobody's row.
    """


class RankGroup(Protocol):
    """One rank's view of its group. All ranks make the same calls in the same order.

    Every call raises RankLost when another rank does not take part in it.
    """

    @property
    def rank(self) -> int:
        """0 leads: it alone samples, and has connections to others."""

    @property
    def size(self) -> int:
        """Ranks of the group: the degree of tensor parallelism."""

    @property
    def is_recordable(self) -> bool:
        """Whether a recording of a step holds the calls of this, too. All ranks record alike."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the `x` of all ranks, the same bits on each; may overwrite `x`."""

    def gather_columns(self, x: Tensor, num_columns: int) -> Tensor:
        """The `x` of all ranks side by side, [num_rows, num_columns] on rank 0; `x` elsewhere.

        x: [num_rows, columns of this rank], which are `split_evenly` of num_columns.
        """

    def broadcast(self, x: Tensor) -> Tensor:
        """The `x` of rank 0 on every rank, in the memory of its own `x`, of the same shape."""

    def barrier(self) -> None:
        """Return once all ranks are here."""

    def least(self, value: int) -> int:
        """The smallest `value` of all ranks, however long some of them take to get here."""

    def abort(self) -> None:
        """End what waits for a rank that is gone, whichever thread does; the group is void then."""


class SingleRank:
    """Implements RankGroup for a model on one rank, at no cost."""

    rank = 0
    size = 1
    is_recordable = True  # there is nothing to record

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather_columns(self, x: Tensor, num_columns: int) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def barrier(self) -> None:
        pass

    def least(self, value: int) -> int:
        return value

    def abort(self) -> None:
        pass


def split_evenly(total: int, size: int, rank: int) -> range:
    """What `rank` of `size` has of `total` things: all have as many, the last ones maybe fewer."""
    share = -(-total // size)
    return range(min(rank * share, total), min((rank + 1) * share, total))
