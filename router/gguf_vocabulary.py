"""The vocabulary in the metadata of a GGUF file: the text of each token and what it is for."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import tokenizers

from pagewire.router.tokenizer import TokenizerError

_Item = TypeVar("_Item")


class TokenType(IntEnum):
    """Values of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2  # stands for text that nothing else in the vocabulary covers
    CONTROL = 3  # has a meaning, no text
    USER_DEFINED = 4  # found in a text before anything else is
    UNUSED = 5
    BYTE = 6  # one byte of a character that the vocabulary does not have


_SPECIAL = frozenset({TokenType.UNKNOWN, TokenType.CONTROL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokens of a model; the index of a token is its id."""

    tokens: list[str]
    types: list[int]  # TokenType of each token

    def ids(self) -> dict[str, int]:
        """The id of each token."""
        return {token: token_id for token_id, token in enumerate(self.tokens)}

    def of_type(self, *types: TokenType) -> list[str]:
        """The tokens of any of these types."""
        return [
            token
            for token, token_type in zip(self.tokens, self.types, strict=True)
            if token_type in types
        ]

    def add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        """Let `backend` find special and user-defined tokens in a text, before it changes it."""
        for special, types in ((True, _SPECIAL), (False, {TokenType.USER_DEFINED})):
            backend.add_tokens(
                [
                    tokenizers.AddedToken(token, special=special, normalized=False)
                    for token in self.of_type(*types)
                ]
            )


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of the file; a token without a type is a normal one.

    Raises:
        TokenizerError: it has none, or not one type for each token.
    """
    tokens = required_list(metadata, "tokenizer.ggml.tokens", str)
    key = "tokenizer.ggml.token_type"
    if key not in metadata:
        return Vocabulary(tokens=tokens, types=[TokenType.NORMAL] * len(tokens))
    return Vocabulary(tokens=tokens, types=list_per_token(metadata, key, int, len(tokens)))


def required_list(metadata: Mapping[str, Any], key: str, kind: type[_Item]) -> list[_Item]:
    """The list under `key`. Raises TokenizerError when it is missing or of something else."""
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
        raise TokenizerError(f"{key} is missing from the GGUF file; convert the model again")
    return value


def list_per_token(
    metadata: Mapping[str, Any], key: str, kind: type[_Item], num_tokens: int
) -> list[_Item]:
    """As `required_list`; raises TokenizerError also when it is not one item for each token."""
    items = required_list(metadata, key, kind)
    if len(items) != num_tokens:
        raise TokenizerError(
            f"{key} has {len(items)} items for {num_tokens} tokens; convert the model again"
        )
    return items


def named_token(metadata: Mapping[str, Any], vocabulary: Vocabulary, name: str) -> str:
    """The token whose id is tokenizer.ggml.`name`, empty without one.

    Raises:
        TokenizerError: the id is outside the vocabulary.
    """
    token_id = metadata.get(f"tokenizer.ggml.{name}")
    if token_id is None:
        return ""
    if not 0 <= token_id < len(vocabulary.tokens):
        raise TokenizerError(f"tokenizer.ggml.{name} is {token_id}, outside the vocabulary")
    return str(vocabulary.tokens[token_id])
