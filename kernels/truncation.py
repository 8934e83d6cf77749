"""Top-k, top-p and min-p: which tokens are too unlikely to be drawn.

Each keeps the tokens above a threshold, so a token as likely as the last that is kept is kept too.
"""

import torch
from torch import Tensor

from pagewire.kernels import vocabulary_blocks

# Sorting is what costs. Nearly every top-k and top-p is decided among so many tokens.
_SHORTLISTS = (64, 1024)


class Truncation:
    """Top-k, top-p and min-p of some rows."""

    def __init__(self, *, top_k: Tensor, top_p: Tensor, min_p: Tensor, vocab_size: int) -> None:
        """All [num_rows], as in `pagewire.kernels.ops.SamplingRows`."""
        is_sorted = (top_p < 1) | (top_k < vocab_size)
        self._vocab_size = vocab_size
        self._rows = is_sorted.nonzero()[:, 0]  # int64 [num_sorted]
        self._top_k = top_k[self._rows, None]
        self._top_p = top_p[self._rows, None]
        self._min_p = min_p[:, None]
        self.is_empty = not len(self._rows) and not bool((min_p > 0).any())

    def apply(self, weights: Tensor) -> None:
        """Set to 0, in place, the weights of what is left out.

        weights: float32 [num_rows, vocab_size], proportional to probabilities, 1 for the most
        likely token of each row.
        """
        least = self._min_p.clone()  # its threshold is the parameter itself, as the maximum is 1
        if len(self._rows):
            rows = weights[self._rows]
            least[self._rows] = torch.maximum(least[self._rows], self._least_of_sorted(rows))
        weights.mul_(weights >= least)

    def _least_of_sorted(self, weights: Tensor) -> Tensor:
        """The smallest weight that top-k, and top-p over what it left, keep; [num_sorted, 1]."""
        least = torch.zeros_like(weights[:, :1])
        total = vocabulary_blocks.total(weights)
        pending = torch.arange(len(weights), device=weights.device)
        for width in (*_SHORTLISTS, self._vocab_size):
            found, is_decided = _decide(
                weights[pending].topk(min(width, self._vocab_size), dim=-1).values,
                total[pending],
                self._top_k[pending],
                self._top_p[pending],
                vocab_size=self._vocab_size,
            )
            least[pending[is_decided]] = found[is_decided]
            pending = pending[~is_decided]
            if not len(pending):
                break
        return least


def _decide(
    largest: Tensor, total: Tensor, top_k: Tensor, top_p: Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The smallest kept among the `largest` weights, and whether they suffice to tell.

    largest: float32 [num_rows, width], descending; total: float64 [num_rows, 1], of all weights.
    """
    width = largest.shape[1]
    in_top_k = torch.arange(width, device=largest.device) < top_k
    mass = largest.double().where(in_top_k, 0.0)
    cumulative = mass.cumsum(dim=-1)
    holds_top_k = top_k <= width
    wanted = top_p * torch.where(holds_top_k, cumulative[:, -1:], total)
    is_decided = holds_top_k | ((top_k == vocab_size) & (cumulative[:, -1:] >= wanted))
    # A token is kept while those before it do not yet reach top-p.
    kept = in_top_k & (cumulative - mass < wanted)
    last = (kept.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return largest.gather(1, last), is_decided[:, 0]
