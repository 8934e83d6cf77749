"""Finds out where a model keeps its tokenizer and loads it."""

from pathlib import Path

from pagewire.router.tokenizer import Tokenizer
from pagewire.router.tokenizer_gguf import load_gguf_tokenizer
from pagewire.router.tokenizer_hf import load_hf_tokenizer


def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer of a model: of a directory with tokenizer.json, or of a GGUF file.

    Raises:
        TokenizerError: it is of a kind that is not supported, or incomplete.
        GGUFError: the GGUF file cannot be read.
        OSError: there is no such model.
    """
    return load_hf_tokenizer(model) if model.is_dir() else load_gguf_tokenizer(model)
