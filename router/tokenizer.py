"""Text to token ids and back, for one model.

A tokenizer comes from a GGUF file (`tokenizer_gguf`) or a model directory (`tokenizer_hf`) and
is immutable: requests use it from several threads.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import tokenizers
from tokenizers import normalizers

# A noncharacter of Unicode: it has no meaning in text, and is left out of every text encoded.
_CUT = "\U0010ffff"


class TokenizerError(ValueError):
    """The tokenizer of the model cannot be used; the message says what would help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """What a model says about its tokenizer beside the vocabulary."""

    token_bytes: Callable[[str], bytes]  # the bytes of a vocabulary entry
    eos_token_ids: frozenset[int]  # any of them ends an answer
    bos_token: str  # empty without one
    eos_token: str
    chat_template: str | None


class Tokenizer:
    """The vocabulary of one model and the way from text to it."""

    def __init__(self, backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
        """Takes over `backend`, which must find its special tokens before it normalizes a text."""
        self.backend = backend
        backend.normalizer = _without_cuts(backend.normalizer)
        self.config = config
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        # Only tokens of at least two characters can be cut.
        special = sorted((added[i].content for i in self._special_ids), key=len, reverse=True)
        pattern = "|".join(re.escape(each) for each in special if len(each) > 1)
        self._special_pattern = re.compile(pattern) if pattern else None
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a plain prompt, with the tokens that the model expects around it.

        Special tokens written out in the text become the special tokens, as in other servers
        of this API: a client that renders its own chat template depends on it.
        """
        return self.backend.encode(text, add_special_tokens=True).ids

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a rendered chat template.

        Special tokens of the template become special tokens, those in a text that went through
        `as_plain_text` stay text.
        """
        return self.backend.encode(text, add_special_tokens=False).ids

    def as_plain_text(self, text: str) -> str:
        """Mark what a user wrote so that it cannot become a special token in a template.

        Each special token spelt out in it gets an invisible cut, which is there while special
        tokens are found and gone when the text is encoded. So a message cannot end its turn and
        begin another, and its tokens are those of a text in which nothing is special.
        """
        text = text.replace(_CUT, "")
        if self._special_pattern is None:
            return text
        pieces, start = [], 0
        # From one character on, not from the end of the match: spelt tokens may overlap.
        while match := self._special_pattern.search(text, start):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        return _CUT.join([*pieces, text[start:]])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; none for special tokens and ids that are not in the vocabulary."""
        token = None if token_id in self._special_ids else self.backend.id_to_token(token_id)
        return b"" if token is None else self.config.token_bytes(token)

    def spelled(self, token_id: int) -> bytes:
        """The bytes of a token, its name for a special one; none for an id without a token."""
        if token_id not in self._special_ids:
            return self.token_bytes(token_id)
        return (self.backend.id_to_token(token_id) or "").encode("utf-8")


def _without_cuts(normalizer: normalizers.Normalizer | None) -> normalizers.Normalizer:
    remove = normalizers.Replace(_CUT, "")
    return remove if normalizer is None else normalizers.Sequence([remove, normalizer])
