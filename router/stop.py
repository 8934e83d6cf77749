"""Finds stop strings in text that arrives in pieces.

Text that might be the beginning of a stop string is held back until it is decided. The result
does not depend on how the text was cut into pieces: the stop string that is complete first wins,
and among those complete at the same character the longest.
"""

from collections.abc import Sequence


class StopChecker:
    """Cuts a text at the first of its stop strings."""

    def __init__(self, stop: Sequence[str]) -> None:
        """`stop` holds no empty string; without any, text passes through unchanged."""
        self._matchers = [_PrefixMatcher(each) for each in stop]
        self._held = ""
        self.matched: str | None = None  # the stop string that was found

    def push(self, text: str) -> str:
        """The part of the text up to now that is new and certain to belong to the output."""
        if not self._matchers or self.matched is not None:
            return text if self.matched is None else ""
        start = len(self._held)
        self._held += text
        for index in range(start, len(self._held)):
            complete = self._advance(self._held[index])
            if complete is not None:
                self.matched = complete
                return self._release(index + 1 - len(complete), drop_rest=True)
        return self._release(len(self._held) - max(each.length for each in self._matchers))

    def finish(self) -> str:
        """The text that was still held back, when there will be no more."""
        return self._release(len(self._held))

    def _advance(self, character: str) -> str | None:
        complete = [each.pattern for each in self._matchers if each.advance(character)]
        return max(complete, key=len) if complete else None

    def _release(self, length: int, *, drop_rest: bool = False) -> str:
        released, rest = self._held[:length], self._held[length:]
        self._held = "" if drop_rest else rest
        return released


class _PrefixMatcher:
    """Knuth-Morris-Pratt: the longest prefix of the pattern that the text ends with."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.length = 0  # of that prefix
        self._borders = _borders(pattern)

    def advance(self, character: str) -> bool:
        """Append a character; whether the text now ends with the whole pattern."""
        self.length = _extend(self.pattern, self._borders, self.length, character)
        return self.length == len(self.pattern)


def _borders(pattern: str) -> list[int]:
    """For each n, the longest proper prefix of pattern[:n] that it also ends with."""
    borders = [0, 0]
    for character in pattern[1:]:
        borders.append(_extend(pattern, borders, borders[-1], character))
    return borders


def _extend(pattern: str, borders: Sequence[int], length: int, character: str) -> int:
    while length and (length == len(pattern) or pattern[length] != character):
        length = borders[length]
    return length + 1 if pattern[length] == character else 0
