"""Drafts for speculative decoding: tokens that a step checks together with the one it needs. Pure.

A draft is looked up in the sequence itself: what followed the last occurrence of its newest tokens
is proposed to follow again (prompt lookup decoding, Saxena 2023). Such a drafter is certain of its
tokens, so rejection sampling (Leviathan et al. 2023) accepts a draft with the probability that the
model gives it, and samples from the other tokens if not. Sampling a token of the model's own and
keeping the drafts that it equals does exactly that. Random numbers are keyed by position, so the
tokens are moreover the very ones that the sequence would have without any draft.
"""

from collections.abc import Iterable, Sequence

MAX_DRAFTS = 8
_MAX_NGRAM = 3
_MIN_NGRAM = 2
_FIRST_PAUSE = 8  # tokens
_LONGEST_PAUSE = 512


class NgramDrafter:
    """Proposes what followed the last occurrence of a sequence's newest tokens."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._tokens: list[int] = []
        # Where the continuation of each n-gram starts, for the latest that has one.
        self._continuations: dict[tuple[int, ...], int] = {}
        self.extend(token_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """The sequence goes on with `token_ids`."""
        for token in token_ids:
            end = len(self._tokens)
            for size in range(_MIN_NGRAM, min(_MAX_NGRAM, end) + 1):
                self._continuations[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def propose(self, limit: int) -> tuple[int, ...]:
        """Up to `limit` tokens that may come next; none when the newest tokens are new together.

        The longest n-gram that occurred before decides. A continuation that reaches the end of the
        sequence goes on into itself, which follows a repetition of any period.
        """
        start = self._continuation()
        if start is None:
            return ()
        tokens = self._tokens[start : start + limit]
        period = len(tokens)
        while len(tokens) < limit:
            tokens.append(tokens[-period])
        return tuple(tokens)

    def _continuation(self) -> int | None:
        for size in range(min(_MAX_NGRAM, len(self._tokens)), _MIN_NGRAM - 1, -1):
            start = self._continuations.get(tuple(self._tokens[-size:]))
            if start is not None:
                return start
        return None


class DraftLength:
    """How many tokens to draft for one sequence: more while drafts are right, none while they fail.

    A draft that is right in full doubles the next one; one that is mostly wrong halves it. Two of
    the latter in a row pause drafting, for twice as long each time, so that a sequence that never
    repeats itself pays for ever fewer attempts.
    """

    def __init__(self) -> None:
        self._length = 2
        self._num_failures = 0
        self._pause = _FIRST_PAUSE
        self._num_skipped = 0  # tokens still to go without a draft

    @property
    def value(self) -> int:
        """Tokens to draft in the next step; 0 during a pause."""
        return 0 if self._num_skipped else self._length

    def on_step(self, *, num_drafted: int, num_accepted: int) -> None:
        """A step has checked `num_drafted` tokens, of which the first `num_accepted` were right."""
        if not num_drafted:
            self._num_skipped = max(0, self._num_skipped - 1)
        elif num_accepted == num_drafted:
            self._length = min(MAX_DRAFTS, 2 * self._length)
            self._num_failures, self._pause = 0, _FIRST_PAUSE
        elif 2 * num_accepted < num_drafted:
            self._on_failure()
        else:
            self._num_failures = 0

    def _on_failure(self) -> None:
        self._length = max(1, self._length // 2)
        self._num_failures += 1
        if self._num_failures >= 2:
            self._num_failures = 0
            self._num_skipped = self._pause
            self._pause = min(_LONGEST_PAUSE, 2 * self._pause)


def num_accepted(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """How many leading drafts are the tokens that the model sampled in their places.

    `sampled` has one token more than `drafts`: the one after the last draft.
    """
    count = 0
    while count < len(drafts) and drafts[count] == sampled[count]:
        count += 1
    return count
