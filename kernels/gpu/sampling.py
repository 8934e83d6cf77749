"""Sampling and log probabilities in Triton: few passes over the vocabulary, and nothing is sorted.

No number goes to the host before the tokens do, so a CUDA graph can hold all of it.
"""

import torch
from torch import Tensor

from pagewire.kernels.gpu.arguments import require
from pagewire.kernels.gpu.inverse_cdf import draw
from pagewire.kernels.gpu.truncation import truncate
from pagewire.kernels.gpu.vocabulary_softmax import vocabulary_softmax
from pagewire.kernels.ops import Logprobs, SamplingRows


class TritonSamplingPlan:
    """Implements `pagewire.kernels.ops.SamplingPlan`.

    Reads the parameters when it runs: a graph follows what is written to them. Runs raise
    KernelArgumentError for tensors that are not as `SamplingPlan.run` says.
    """

    def __init__(self, rows: SamplingRows) -> None:
        self._rows = rows

    def run(self, logits: Tensor, uniform: Tensor) -> Tensor:
        rows = self._rows
        require(
            logits.shape[-1] == rows.vocab_size,
            f"the plan is for a vocabulary of {rows.vocab_size}, the logits are of "
            f"{logits.shape[-1]} tokens; plan again",
        )
        softmax = vocabulary_softmax(logits, rows.temperature)
        truncation = truncate(
            logits,
            softmax,
            temperature=rows.temperature,
            top_k=rows.top_k,
            top_p=rows.top_p,
            min_p=rows.min_p,
        )
        draw(logits, softmax, truncation, temperature=rows.temperature, uniform=uniform)
        return softmax.tokens


def logprobs(logits: Tensor, rows: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """Implements `Ops.logprobs`. Raises KernelArgumentError for logits that are not as it says."""
    logits = logits[rows]  # [num_rows, vocab_size]
    softmax = vocabulary_softmax(logits, torch.ones(len(rows), device=logits.device))
    normalizer = softmax.highest.double() + softmax.total.log()
    top, top_ids = torch.topk(logits, num_top, dim=-1)
    tokens = tokens.to(logits.device)
    return Logprobs(
        sampled=logits.gather(1, tokens[:, None])[:, 0].double() - normalizer,
        top_ids=top_ids,
        top=top.double() - normalizer[:, None],
    )
