"""Byte-level BPE from a GGUF file, as GPT-2, Llama 3, Qwen and SmolLM use it.

The file names the rule that takes a text apart into words before merging; it was fixed when the
model was trained, and another one gives other tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pagewire.router.gguf_vocabulary import Vocabulary, required_list
from pagewire.router.tokenizer import TokenizerError

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def byte_level_backend(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """The tokenizer of a model whose tokenizer.ggml.model is "gpt2".

    Raises:
        TokenizerError: the merges are missing, or tokenizer.ggml.pre is not known.
    """
    merges = [
        (left, right)
        for left, _, right in (
            merge.partition(" ") for merge in required_list(metadata, "tokenizer.ggml.merges", str)
        )
    ]
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary.ids(), merges=merges, ignore_merges=pre == "llama-bpe")
    )
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    vocabulary.add_tokens(backend)
    return backend


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
