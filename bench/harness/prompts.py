"""Prompts of exact length that no prefix cache has seen, and that are the same in every run.

Phrases of an English text in random order: a model continues them as it does ordinary prose, and
two prompts share at most a few tokens at their start.
"""

import random
from collections.abc import Sequence
from pathlib import Path

TEXT = Path(__file__).parents[2] / "LICENSE"  # English that is always here
PHRASE_TOKENS = 8


class PromptSource:
    """An endless supply of different prompts, the same for the same seed."""

    def __init__(self, tokens: Sequence[int], *, seed: int) -> None:
        """`tokens` of a text. Raises ValueError when they are less than two phrases."""
        if len(tokens) < 2 * PHRASE_TOKENS:
            raise ValueError(f"the text has {len(tokens)} tokens, less than two phrases")
        self._tokens = tokens
        self._random = random.Random(seed)

    def take(self, count: int, length: int) -> list[list[int]]:
        """`count` prompts of `length` tokens each."""
        return [self._prompt(length) for _ in range(count)]

    def _prompt(self, length: int) -> list[int]:
        prompt: list[int] = []
        while len(prompt) < length:
            start = self._random.randrange(len(self._tokens) - PHRASE_TOKENS)
            prompt += self._tokens[start : start + PHRASE_TOKENS]
        return prompt[:length]
