"""Log probabilities of tokens, in the two forms of the OpenAI API.

Both show a token as text, although a token need not be whole characters: what is cut is replaced,
and the chat form carries the bytes beside it.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pagewire.proto import worker_pb2 as pb

Spell = Callable[[int], bytes]  # token id to its bytes, special tokens by their names

_LEAST = -9999.0  # JSON has no infinity


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token of an output and what its worker said of it."""

    token_id: int
    values: pb.TokenLogprobs

    @property
    def logprob(self) -> float:
        return max(self.values.logprob, _LEAST)

    @property
    def top(self) -> list[tuple[int, float]]:
        """(token id, logprob) of the most likely tokens, the most likely first."""
        pairs = zip(self.values.top_token_ids, self.values.top_logprobs, strict=True)
        return [(token_id, max(logprob, _LEAST)) for token_id, logprob in pairs]


LogprobsFormat = Callable[[Sequence[TokenLogprob]], dict[str, Any]]


class ChatLogprobs:
    """`logprobs` of a choice of /v1/chat/completions."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell

    def __call__(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            self._entry(token.token_id, token.logprob)
            | {"top_logprobs": [self._entry(*pair) for pair in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._spell(token_id)
        return {"token": _text(data), "logprob": logprob, "bytes": list(data)}


class CompletionLogprobs:
    """`logprobs` of a choice of /v1/completions, whole or piece by piece."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0  # characters of the output before the next token

    def __call__(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [_text(self._spell(token.token_id)) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [self._advance(token.token_id) for token in tokens],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """By text, the sampled token among them; of tokens with the same text, the likeliest."""
        top: dict[str, float] = {}
        for token_id, logprob in [*token.top, (token.token_id, token.logprob)]:
            top.setdefault(_text(self._spell(token_id)), logprob)
        return top

    def _advance(self, token_id: int) -> int:
        offset = self._offset
        self._offset += len(self._decoder.decode(self._spell(token_id)))
        return offset


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
