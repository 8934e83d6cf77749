"""The part of a matrix product that one program computes at a time, and the choice of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from pagewire.kernels.gpu.variant import LaunchConfig

GROUP_TILES = 8  # rows of tiles that run side by side, so that they find the matrix in L2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Sizes are powers of two."""

    tokens: int
    outputs: int
    inputs: int  # of one step of the sum
    launch: LaunchConfig

    @property
    def name(self) -> str:
        return f"{self.tokens}x{self.outputs}x{self.inputs}"


def choose_tile(tiles: Sequence[Tile], num_tokens: int) -> Tile:
    """The first, and so the smallest, that holds all tokens, or the last."""
    return next((tile for tile in tiles if num_tokens <= tile.tokens), tiles[-1])
