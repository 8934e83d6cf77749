"""From logits to tokens, for all rows of a step at once.

The one random number of a token depends on (seed, output position) and on nothing else, so a
request samples the same tokens in any batch, on any worker and after a resume.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pagewire.engine.batch import SamplingParams

# Enough for nearly every top-p; a longer tail is sorted in full.
SHORTLIST = 1024


def sample(
    logits: Tensor, params: Sequence[SamplingParams], output_positions: Sequence[int]
) -> list[int]:
    """One token id a row.

    logits: [num_rows, vocab_size]; `output_positions` count a request's output tokens. The order
    is temperature, top-k, top-p over what top-k left; tokens as likely as the last that is kept
    are kept too. Temperature 0 is the first of the most likely tokens.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [index for index, row in enumerate(params) if row.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(
            logits[drawn],
            [params[index] for index in drawn],
            [output_positions[index] for index in drawn],
        )
    result: list[int] = tokens.tolist()
    return result


def _draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """int64 [num_rows]: inverts the cumulative distribution, in order of token ids."""
    device = logits.device
    temperature = torch.tensor(
        [row.temperature for row in params], dtype=torch.float64, device=device
    )
    # Differences to the maximum first: a tiny temperature then gives 0 and -inf, never inf - inf.
    logits = (logits - logits.amax(dim=-1, keepdim=True)).double() / temperature[:, None]
    probabilities = _truncate(logits.softmax(dim=-1), params)
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform([row.seed for row in params], positions).to(device)[:, None]
    return torch.searchsorted(cumulative, target * cumulative[:, -1:], right=True)[:, 0]


def _truncate(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zero what top-k and top-p leave out; [num_rows, vocab_size]."""
    vocab_size = probabilities.shape[1]
    cut = [i for i, row in enumerate(params) if row.top_p < 1.0 or 0 < row.top_k < vocab_size]
    if cut:
        rows = probabilities[cut]
        least = _least_kept(rows, [params[index] for index in cut])
        probabilities[cut] = rows.where(rows >= least, 0.0)
    return probabilities


def _least_kept(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The smallest probability that top-k and top-p keep, [num_rows, 1]."""
    vocab_size, device = probabilities.shape[1], probabilities.device
    top_k = torch.tensor([[min(row.top_k or vocab_size, vocab_size)] for row in params])
    top_p = torch.tensor([[row.top_p] for row in params], dtype=torch.float64)
    shortlist = min(vocab_size, max(SHORTLIST, *(row.top_k for row in params)))
    for width in (shortlist, vocab_size):
        largest = probabilities.topk(width, dim=-1).values
        in_top_k = torch.arange(width, device=device) < top_k.to(device)
        largest = largest.where(in_top_k, 0.0)
        cumulative = largest.cumsum(dim=-1)
        # Top-p counts from what top-k left, which is everything when the shortlist is the shorter.
        total = cumulative[:, -1:].where(top_k.to(device) <= width, 1.0)
        wanted = top_p.to(device) * total
        if bool((cumulative[:, -1:] >= wanted).all()):
            break
    # A token is kept while those before it do not yet reach top-p.
    kept = in_top_k & (cumulative - largest < wanted)
    return largest.gather(1, kept.sum(dim=-1, keepdim=True) - 1)


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """A number of [0, 1) for each (seed, position), float64 on the CPU.

    Two rounds of the SplitMix64 finaliser, which is exact in any integer arithmetic of 64 bits.
    """
    signed = [seed - (1 << 64) if seed >> 63 else seed for seed in seeds]
    state = _mix(torch.tensor(signed, dtype=torch.int64)) + torch.tensor(positions)
    return _shift_right(_mix(state), 11).double() / (1 << 53)


def _mix(state: Tensor) -> Tensor:
    state = state - 0x61C8864680B583EB  # the golden ratio's fraction, as a signed number
    state = (state ^ _shift_right(state, 30)) * -0x40A7B892E31B1A47
    state = (state ^ _shift_right(state, 27)) * -0x6B2FB644ECCEEE15
    return state ^ _shift_right(state, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
