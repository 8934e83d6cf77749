"""Log probabilities of sampled tokens and of the most likely ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pagewire.engine import vocabulary_blocks
from pagewire.engine.batch import TokenLogprobs


def token_logprobs(
    logits: Tensor, tokens: Tensor, num_top: Sequence[int]
) -> list[tuple[TokenLogprobs, ...]]:
    """The log-softmax of each row at its token and at its `num_top` most likely tokens.

    logits: float32 [num_rows, vocab_size], as the model gave them; tokens: int64 [num_rows].
    """
    highest = logits.amax(dim=-1, keepdim=True)
    total = vocabulary_blocks.total((logits - highest).exp_())
    normalizer = highest.double() + total.log()  # [num_rows, 1]
    sampled = logits.gather(1, tokens[:, None]).double() - normalizer
    width = min(max(num_top), logits.shape[1])
    values, ids = torch.topk(logits, width, dim=-1)
    columns = (sampled[:, 0].tolist(), ids.tolist(), (values.double() - normalizer).tolist())
    return [
        (TokenLogprobs(logprob=logprob, top=tuple(zip(top[:count], values[:count], strict=True))),)
        for logprob, top, values, count in zip(*columns, num_top, strict=True)
    ]
