"""Sampling and log probabilities in plain torch, for all rows of a step at once."""

import torch
from torch import Tensor

from pagewire.kernels import vocabulary_blocks
from pagewire.kernels.ops import FAULTY, Logprobs, SamplingRows
from pagewire.kernels.truncation import Truncation


class TorchSamplingPlan:
    """Implements `pagewire.kernels.ops.SamplingPlan`."""

    def __init__(self, rows: SamplingRows) -> None:
        is_drawn = rows.temperature > 0
        self._drawn = is_drawn.nonzero()[:, 0]  # int64 [num_drawn]
        self._all_drawn = len(self._drawn) == len(is_drawn)
        self._temperature = rows.temperature[self._drawn, None]
        self._truncation = Truncation(
            top_k=rows.top_k[self._drawn],
            top_p=rows.top_p[self._drawn],
            min_p=rows.min_p[self._drawn],
            vocab_size=rows.vocab_size,
        )

    def run(self, logits: Tensor, uniform: Tensor) -> Tensor:
        highest, tokens = vocabulary_blocks.maximum(logits)
        is_faulty = ~highest.isfinite()
        if is_faulty.any():  # drawn all the same, but not from what cannot be searched
            logits = logits.masked_fill(is_faulty[:, None], 0.0)
            highest = highest.masked_fill(is_faulty, 0.0)
        if self._all_drawn:
            tokens = self._draw(logits, highest, uniform)
        elif len(self._drawn):
            rows = self._drawn
            tokens[rows] = self._draw(logits[rows], highest[rows], uniform[rows])
        return tokens.masked_fill_(is_faulty, FAULTY)

    def _draw(self, logits: Tensor, highest: Tensor, uniform: Tensor) -> Tensor:
        # Differences to the maximum first: a tiny temperature gives 0 and -inf, never inf - inf.
        # In place: fresh memory for a whole batch costs more than the arithmetic on it.
        weights = logits - highest[:, None]
        weights.div_(self._temperature).exp_()
        if not self._truncation.is_empty:
            self._truncation.apply(weights)
        return vocabulary_blocks.inverse_cdf(weights, uniform)


def logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """The log-softmax of each row at its token and at the `num_top` most likely ones.

    logits: float32 [num_rows, vocab_size]; tokens: int64 [num_rows].
    """
    highest = logits.amax(dim=-1, keepdim=True)
    total = vocabulary_blocks.total((logits - highest).exp_())
    normalizer = highest.double() + total.log()  # [num_rows, 1]
    tokens = tokens.to(logits.device)
    top, top_ids = torch.topk(logits, num_top, dim=-1)
    return Logprobs(
        sampled=(logits.gather(1, tokens[:, None]).double() - normalizer)[:, 0],
        top_ids=top_ids,
        top=top.double() - normalizer,
    )
