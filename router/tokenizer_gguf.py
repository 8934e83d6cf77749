"""Builds the tokenizer of a model from the metadata of its GGUF file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from pagewire.router.gguf_byte_level import byte_level_backend
from pagewire.router.gguf_metadata import read_metadata
from pagewire.router.gguf_sentencepiece import sentencepiece_backend
from pagewire.router.gguf_vocabulary import Vocabulary, named_token, read_vocabulary
from pagewire.router.token_bytes import byte_fallback_bytes, byte_level_bytes
from pagewire.router.tokenizer import Tokenizer, TokenizerConfig, TokenizerError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """How to read one kind of tokenizer."""

    backend: Callable[[Mapping[str, Any], Vocabulary], tokenizers.Tokenizer]
    token_bytes: Callable[[str], bytes]


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file.

    Raises:
        GGUFError: the file cannot be read.
        TokenizerError: it has a kind of tokenizer that is not supported, or an incomplete one.
    """
    metadata = read_metadata(path)
    kind = _kind(metadata)
    vocabulary = read_vocabulary(metadata)
    backend = kind.backend(metadata, vocabulary)
    if _adds_bos(metadata):
        backend.post_processor = _begin_with_bos(metadata, vocabulary)
    return Tokenizer(backend, _config(metadata, vocabulary, kind))


def _kind(metadata: Mapping[str, Any]) -> _Kind:
    match metadata.get("tokenizer.ggml.model"):
        case "gpt2":
            return _Kind(backend=byte_level_backend, token_bytes=byte_level_bytes)
        case "llama":
            return _Kind(backend=sentencepiece_backend, token_bytes=byte_fallback_bytes)
        case other:
            raise TokenizerError(
                f"tokenizer.ggml.model is {other!r}; only gpt2 (byte-level BPE) and llama "
                "(SentencePiece's BPE) can be read from GGUF. Give a directory with the "
                "tokenizer.json of the model instead"
            )


def _config(metadata: Mapping[str, Any], vocabulary: Vocabulary, kind: _Kind) -> TokenizerConfig:
    ends = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [metadata.get(f"tokenizer.ggml.{name}") for name in ends]
    return TokenizerConfig(
        token_bytes=kind.token_bytes,
        eos_token_ids=frozenset(each for each in ids if each is not None),
        bos_token=named_token(metadata, vocabulary, "bos_token_id"),
        eos_token=named_token(metadata, vocabulary, "eos_token_id"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a prompt begins with the bos token; files that do not say follow their family."""
    is_llama = (
        metadata["tokenizer.ggml.model"] == "llama"
        or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    )
    return bool(metadata.get("tokenizer.ggml.add_bos_token", is_llama))


def _begin_with_bos(
    metadata: Mapping[str, Any], vocabulary: Vocabulary
) -> processors.PostProcessor:
    bos_token = named_token(metadata, vocabulary, "bos_token_id")
    if not bos_token:
        raise TokenizerError(
            "prompts of this model begin with a bos token, but tokenizer.ggml.bos_token_id is "
            "missing; set it, or tokenizer.ggml.add_bos_token to false"
        )
    return processors.TemplateProcessing(
        single=[bos_token, "$A"], special_tokens=[(bos_token, vocabulary.tokens.index(bos_token))]
    )
