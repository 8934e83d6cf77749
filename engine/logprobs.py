"""Log probabilities of a step's rows, in the form that schedulers pass on."""

from collections.abc import Sequence

from pagewire.engine.batch import TokenLogprobs
from pagewire.kernels.ops import Logprobs


def token_logprobs(values: Logprobs, num_top: Sequence[int]) -> list[tuple[TokenLogprobs, ...]]:
    """One entry a row, with as many of the most likely tokens as `num_top` says of it."""
    columns = (values.sampled.tolist(), values.top_ids.tolist(), values.top.tolist(), num_top)
    return [
        (TokenLogprobs(logprob=logprob, top=tuple(zip(ids[:count], top[:count], strict=True))),)
        for logprob, ids, top, count in zip(*columns, strict=True)
    ]
