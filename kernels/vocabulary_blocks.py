"""Searches over the vocabulary in two levels: which block of tokens, then which token in it.

torch's own argmax, sum in float64 and cumsum read a row one number at a time. Maxima and sums of
blocks run at the speed of memory, and leave one block a row to look into.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 256  # tokens


def maximum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row, NaN where one is, and the first index of it; both [num_rows].

    logits: [num_rows, vocab_size].
    """
    blocks = _in_blocks(logits, fill=float("-inf"))
    highest, block = blocks.amax(dim=-1).max(dim=-1, keepdim=True)
    return highest[:, 0], block[:, 0] * _BLOCK + _select(blocks, block).argmax(dim=-1)


def total(weights: Tensor) -> Tensor:
    """The sum of each row, float64 [num_rows, 1]. weights: float32 [num_rows, vocab_size]."""
    return _in_blocks(weights, fill=0.0).sum(dim=-1).double().sum(dim=-1, keepdim=True)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative weight passes `uniform` of the total, int64 [num_rows].

    weights: float32 [num_rows, vocab_size], not negative, at least one above 0 in each row.
    uniform: float64 [num_rows], from [0, 1). A token without weight is never returned.
    """
    blocks = _in_blocks(weights, fill=0.0)
    sums = blocks.sum(dim=-1).double()  # [num_rows, num_blocks]
    block, rest = _search(sums, uniform[:, None])
    share = rest / sums.gather(1, block)
    token, _ = _search(_select(blocks, block).double(), share)
    return block[:, 0] * _BLOCK + token[:, 0]


def _search(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative weight passes `share`, and how far into that weight; [num_rows, 1]."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Below the total, or the rounding of the product could point behind the last token.
    target = torch.minimum(share * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True)
    return index, target - (cumulative - weights).gather(1, index)


def _in_blocks(values: Tensor, *, fill: float) -> Tensor:
    """[num_rows, num_blocks, block]."""
    padding = -values.shape[1] % _BLOCK
    if padding:
        values = F.pad(values, (0, padding), value=fill)
    return values.reshape(values.shape[0], -1, _BLOCK)


def _select(blocks: Tensor, block: Tensor) -> Tensor:
    """One block of each row, [num_rows, block]."""
    return blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
