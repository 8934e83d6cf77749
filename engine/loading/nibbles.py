"""Eight numbers of 4 bits in each 32-bit word, as checkpoint formats pack them."""

from collections.abc import Sequence

import torch
from torch import Tensor

IN_ORDER = tuple(range(8))


def unpack_columns(words: Tensor, order: Sequence[int] = IN_ORDER) -> Tensor:
    """uint8 [rows, 8 * words]: each word becomes eight columns, the lowest bits first.

    words: int32 [rows, words]. Bits 4 i to 4 i + 3 of a word are the column `order[i]` of its
    eight.
    """
    shifts = torch.empty(8, dtype=torch.int32)
    shifts[list(order)] = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(1)
