"""What an engine needs to be one rank of several; without it, it is the only one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from pagewire.engine.batch import PageCopy
from pagewire.engine.parallel.rank_group import RankGroup, SingleRank
from pagewire.engine.step_memory import StepInputs


class Followers(Protocol):
    """The other ranks, as rank 0 tells them what to do. Raises RankLost when one is gone."""

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Make these copies, each in its own pages."""

    def run(self, inputs: StepInputs) -> None:
        """Take part in the step that rank 0 now begins."""


class NoFollowers:
    """Implements Followers."""

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        pass

    def run(self, inputs: StepInputs) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorParallel:
    """The place of an engine in its group."""

    group: RankGroup = field(default_factory=SingleRank)
    followers: Followers = field(default_factory=NoFollowers)
    # Memory of so many bytes for this rank's pages, uint8; None: nobody else need reach it.
    pool_memory: Callable[[int], Tensor] | None = None
