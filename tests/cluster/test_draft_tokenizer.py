"""A draft model whose tokens mean something else is refused before any worker starts."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import WordLevel

from pagewire.cluster import draft_tokenizer
from pagewire.cluster.draft_tokenizer import require_same_tokens
from pagewire.cluster.errors import StartError
from pagewire.router.tokenizer import Tokenizer, TokenizerConfig

DRAFT = Path("/small.gguf")


def tokenizer(*words: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "?"))
    config = TokenizerConfig(
        token_bytes=str.encode,
        eos_token_ids=frozenset(),
        bos_token="",
        eos_token="",
        chat_template=None,
    )
    return Tokenizer(backend, config)


def check(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(draft_tokenizer, "tokenizer_of", lambda _: tokenizer(*words))
    require_same_tokens(tokenizer("a", "b", "c"), DRAFT)


def test_the_same_tokens_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, "a", "b", "c")


def test_other_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartError, match=r"small\.gguf has another vocabulary .* token 1 differs"):
        check(monkeypatch, "a", "c", "b")


def test_another_number_of_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartError, match=r"small\.gguf has 2 tokens, the model 3"):
        check(monkeypatch, "a", "b")
