"""Drafts that are looked up in the sequence itself (prompt lookup decoding, Saxena 2023). Pure.

What followed the last occurrence of the newest tokens is proposed to follow again. It costs no
model, and is right where a text is copied: edits, summaries, code.
"""

from collections.abc import Iterable

_MAX_NGRAM = 3
_MIN_NGRAM = 2


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
