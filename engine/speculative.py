"""Speculative decoding: a step checks drafted tokens together with the one it needs. Pure.

Whoever drafts, a text looked up in the sequence itself (`ngram_drafter`) or a smaller model
(`draft_model`), the result is exact. The model samples a token of its own in the place of each
draft, with the random number that is keyed by (seed, position), and the drafts that equal theirs
are kept. So drafts decide only how many positions one step computes: every token is the very one
that the sequence would have without any draft, and its distribution is the model's.

For a drafter that is certain of its tokens this accepts as often as rejection sampling (Leviathan
et al. 2023) does. A draft model samples with the random number of the target's own token (common
random numbers): both read their cumulative distributions at the same point, so where the
distributions are alike the tokens are mostly equal, at any temperature.
"""

from collections.abc import Sequence


def num_accepted(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """How many leading drafts are the tokens that the model sampled in their places.

    `sampled` has one token more than `drafts`: the one after the last draft.
    """
    count = 0
    while count < len(drafts) and drafts[count] == sampled[count]:
        count += 1
    return count
