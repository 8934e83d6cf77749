"""Builds the tokenizer of a model from the metadata of its GGUF file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from pagewire.router.gguf_metadata import read_metadata
from pagewire.router.token_bytes import byte_level_bytes
from pagewire.router.tokenizer import Tokenizer, TokenizerConfig, TokenizerError

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file.

    Raises:
        GGUFError: the file cannot be read.
        TokenizerError: it has a kind of tokenizer that is not supported.
    """
    metadata = read_metadata(path)
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise TokenizerError(
            f"tokenizer.ggml.model is {kind!r}; only gpt2 (byte-level BPE) can be read from GGUF. "
            "Give a directory with the tokenizer.json of the model instead"
        )
    return Tokenizer(_backend(metadata), _config(metadata))


def _backend(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    tokens = _required(metadata, "tokenizer.ggml.tokens")
    merges = [
        (left, right)
        for left, _, right in (
            merge.partition(" ") for merge in _required(metadata, "tokenizer.ggml.merges")
        )
    ]
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    )
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    _add_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type", []))
    if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        backend.post_processor = _begin_with(tokens, metadata)
    return backend


def _config(metadata: Mapping[str, Any]) -> TokenizerConfig:
    ends = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [metadata.get(f"tokenizer.ggml.{name}") for name in ends]
    return TokenizerConfig(
        token_bytes=byte_level_bytes,
        eos_token_ids=frozenset(each for each in ids if each is not None),
        bos_token=_token_named(metadata, "bos_token_id"),
        eos_token=_token_named(metadata, "eos_token_id"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _required(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise TokenizerError(f"{key} is missing from the GGUF file; convert the model again")
    return value


def _token_named(metadata: Mapping[str, Any], name: str) -> str:
    token_id = metadata.get(f"tokenizer.ggml.{name}")
    tokens = _required(metadata, "tokenizer.ggml.tokens")
    if token_id is None:
        return ""
    if not 0 <= token_id < len(tokens):
        raise TokenizerError(f"tokenizer.ggml.{name} is {token_id}, outside the vocabulary")
    return str(tokens[token_id])


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], token_types: list[int]) -> None:
    by_type: dict[int, list[str]] = {_CONTROL: [], _USER_DEFINED: []}
    for token, token_type in zip(tokens, token_types, strict=False):
        if token_type in by_type:
            by_type[token_type].append(token)
    for token_type, added in by_type.items():
        special = token_type == _CONTROL
        backend.add_tokens(
            [tokenizers.AddedToken(each, special=special, normalized=False) for each in added]
        )


def _begin_with(tokens: list[str], metadata: Mapping[str, Any]) -> processors.PostProcessor:
    bos_token = _token_named(metadata, "bos_token_id")
    if not bos_token:
        raise TokenizerError("tokenizer.ggml.add_bos_token is set without a bos_token_id")
    return processors.TemplateProcessing(
        single=[bos_token, "$A"], special_tokens=[(bos_token, tokens.index(bos_token))]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    # As the models of this family were trained; it matters for spaces in front of a digit.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    known: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
        "gpt-2": _gpt2,
        "phi-2": _gpt2,
        "olmo": _gpt2,
        "smollm": _single_digits,
        "starcoder": _single_digits,
        "refact": _single_digits,
        "command-r": _single_digits,
        "llama-bpe": lambda: _split_by(_LLAMA3_PATTERN),
        "qwen2": lambda: _split_by(_QWEN2_PATTERN),
    }
    if name not in known:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r}; known are {', '.join(known)}. Give a directory "
            "with the tokenizer.json of the model instead"
        )
    return known[name]()
