"""Drafts that are looked up in the sequence itself (prompt lookup decoding, Saxena 2023). Pure.

What followed the last occurrence of the newest tokens is proposed to follow again. It costs no
model, and is right where a text is copied: edits, summaries, code.
"""

from collections.abc import Iterable
from typing import NamedTuple

MAX_MATCH = 16  # tokens that are compared

_MAX_NGRAM = 3
_MIN_NGRAM = 2


class Match(NamedTuple):
    """An earlier place in a sequence where its newest tokens stand."""

    start: int  # of what followed them there
    num_tokens: int  # how many of the newest stand there, as far as they were compared


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

    def match(self) -> Match | None:
        """Where the newest tokens occurred last; None when they are new together.

        The longest n-gram that occurred before decides.
        """
        for size in range(min(_MAX_NGRAM, len(self._tokens)), _MIN_NGRAM - 1, -1):
            start = self._continuations.get(tuple(self._tokens[-size:]))
            if start is not None:
                return Match(start, self._num_matching(start, size))
        return None

    def continuation(self, match: Match, length: int) -> tuple[int, ...]:
        """`length` tokens that may come next: what followed at `match`.

        One that reaches the end of the sequence goes on into itself, which follows a repetition of
        any period.
        """
        tokens = self._tokens[match.start : match.start + length]
        period = len(tokens)
        while len(tokens) < length:
            tokens.append(tokens[-period])
        return tuple(tokens)

    def _num_matching(self, start: int, known: int) -> int:
        """How many tokens before `start` equal the newest ones; the last `known` do."""
        count = known
        while (
            count < min(start, MAX_MATCH)
            and self._tokens[start - 1 - count] == (self._tokens[-1 - count])
        ):
            count += 1
        return count
