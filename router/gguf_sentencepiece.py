"""SentencePiece's BPE from a GGUF file, as Llama 2, Mistral and TinyLlama use it.

SentencePiece keeps no list of merges: while any two neighbours make an entry of the vocabulary,
it joins those that make the one with the best score. The list is derived here, best score first,
which gives the same tokens; only among entries of equal score may another pair come first.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from pagewire.router.gguf_vocabulary import TokenType, Vocabulary, list_per_token, named_token
from pagewire.router.tokenizer import TokenizerError

_SPACE = "\u2581"  # how the vocabulary writes a space


def sentencepiece_backend(
    metadata: Mapping[str, Any], vocabulary: Vocabulary
) -> tokenizers.Tokenizer:
    """The tokenizer of a model whose tokenizer.ggml.model is "llama".

    A text gets a space in front unless tokenizer.ggml.add_space_prefix is false, and so does what
    follows a special or user-defined token: a turn of a conversation begins like a text.

    Raises:
        TokenizerError: the scores or the unknown token are missing, or the model changes texts in
            a way that is not supported.
    """
    _check_normalization(metadata)
    vocabulary = _with_plain_spaces(vocabulary)
    num_tokens = len(vocabulary.tokens)
    scores = list_per_token(metadata, "tokenizer.ggml.scores", float, num_tokens)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary.ids(),
            merges=_merges(vocabulary, scores),
            byte_fallback=bool(vocabulary.of_type(TokenType.BYTE)),
            unk_token=_unknown_token(metadata, vocabulary),
            fuse_unk=True,
        )
    )
    add_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = _normalizer(add_prefix)
    backend.decoder = _decoder(add_prefix)
    vocabulary.add_tokens(backend)
    return backend


def _check_normalization(metadata: Mapping[str, Any]) -> None:
    for name in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if metadata.get(f"tokenizer.ggml.{name}"):
            raise TokenizerError(
                f"tokenizer.ggml.{name} is set, which is not supported. Give a directory with the "
                "tokenizer.json of the model instead"
            )


def _with_plain_spaces(vocabulary: Vocabulary) -> Vocabulary:
    """The vocabulary with user-defined tokens as they are in a text, not as entries write them."""
    return replace(
        vocabulary,
        tokens=[
            token.replace(_SPACE, " ") if token_type == TokenType.USER_DEFINED else token
            for token, token_type in zip(vocabulary.tokens, vocabulary.types, strict=True)
        ],
    )


def _merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of entries that makes an entry, best score of the result first.

    Only normal entries take part: SentencePiece finds user-defined ones before it merges, and
    takes unused ones apart afterwards, so that they never come out.
    """
    score_of = {
        token: score
        for token, token_type, score in zip(
            vocabulary.tokens, vocabulary.types, scores, strict=True
        )
        if token_type == TokenType.NORMAL
    }
    return [
        (token[:length], token[length:])
        for token in sorted(score_of, key=score_of.__getitem__, reverse=True)
        for length in range(1, len(token))
        if token[:length] in score_of and token[length:] in score_of
    ]


def _unknown_token(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> str:
    """What stands for characters without an entry, where no bytes do."""
    if named := named_token(metadata, vocabulary, "unknown_token_id"):
        return named
    if typed := vocabulary.of_type(TokenType.UNKNOWN):
        return typed[0]
    raise TokenizerError("the vocabulary has no unknown token; set tokenizer.ggml.unknown_token_id")


def _normalizer(add_prefix: bool) -> normalizers.Normalizer:
    spaces = normalizers.Replace(" ", _SPACE)
    return normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if add_prefix else spaces


def _decoder(add_prefix: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
