"""What an engine needs to be one rank of several; without it, it is the only one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pagewire.engine.batch import PageCopy
from pagewire.engine.parallel.rank_group import RankGroup, SingleRank
from pagewire.engine.parallel.rank_pools import RankPools
from pagewire.engine.step_memory import StepArrays


class Followers(Protocol):
    """The other ranks, as rank 0 tells them what to do. Raises RankLost when one is gone."""

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Make these copies, each in its own pages."""

    def warm_up(self, max_rows: int) -> None:
        """Record decode steps of up to so many rows, as rank 0 now does."""

    def run(self, arrays: StepArrays, *, by_layer: bool, is_fed: bool) -> None:
        """Take part in the step that rank 0 now begins, over what `arrays` hold.

        `by_layer`: layer after layer, since rank 0 reports them, and so from no recording. NCCL
        wants a sum in a graph either on all ranks or on none. `is_fed`: see `ModelRunner.run`.
        """


class NoFollowers:
    """Implements Followers."""

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        pass

    def warm_up(self, max_rows: int) -> None:
        pass

    def run(self, arrays: StepArrays, *, by_layer: bool, is_fed: bool) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorParallel:
    """The place of an engine in its group."""

    group: RankGroup = field(default_factory=SingleRank)
    followers: Followers = field(default_factory=NoFollowers)
    pools: RankPools | None = None  # None: nobody else need reach this rank's pages
