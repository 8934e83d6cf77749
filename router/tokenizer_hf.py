"""Loads the tokenizer of a model directory in Hugging Face's layout: JSON files only, no code."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from pagewire.router.token_bytes import byte_fallback_bytes, byte_level_bytes
from pagewire.router.tokenizer import Tokenizer, TokenizerConfig, TokenizerError


def load_hf_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, of which only tokenizer.json is required.

    Raises:
        TokenizerError: a file is missing or damaged, or its kind of tokenizer is not supported.
    """
    path = directory / "tokenizer.json"
    description = _read_json(path)
    if not description:
        raise TokenizerError(f"{directory.name} has no tokenizer.json; add the one of the model")
    backend = _backend(description)
    config = _read_json(directory / "tokenizer_config.json")
    eos_token = _token_text(config.get("eos_token"))
    eos_token_ids = _declared_eos(directory)
    if (eos_token_id := backend.token_to_id(eos_token)) is not None:
        eos_token_ids |= {eos_token_id}
    return Tokenizer(
        backend,
        TokenizerConfig(
            token_bytes=_token_notation(description.get("decoder")),
            eos_token_ids=eos_token_ids,
            bos_token=_token_text(config.get("bos_token")),
            eos_token=eos_token,
            chat_template=_chat_template(directory, config),
        ),
    )


def _backend(description: Mapping[str, Any]) -> tokenizers.Tokenizer:
    # Some files have special tokens found after normalization, where one that a user spelt out
    # would become special: `Tokenizer.as_plain_text` protects a text only until then.
    added_tokens = [
        {**token, "normalized": False} if token.get("special") else token
        for token in description.get("added_tokens", [])
    ]
    return tokenizers.Tokenizer.from_str(json.dumps({**description, "added_tokens": added_tokens}))


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty when there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise TokenizerError(f"{path.name} is not JSON; fetch the model again") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} is not a JSON object; fetch the model again")
    return value


def _token_text(token: object) -> str:
    """A token is written as a string or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _declared_eos(directory: Path) -> frozenset[int]:
    """What ends an answer, from the generation config or else the model's."""
    for name in ("generation_config.json", "config.json"):
        declared = _read_json(directory / name).get("eos_token_id")
        if declared is not None:
            return frozenset(declared if isinstance(declared, list) else [declared])
    return frozenset()


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {each["name"]: each["template"] for each in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_notation(decoder: object) -> Callable[[str], bytes]:
    """How the vocabulary writes bytes, told from the decoder that would undo it."""
    kinds = _decoder_kinds(decoder)
    if "ByteLevel" in kinds:
        return byte_level_bytes
    if kinds & {"ByteFallback", "Metaspace"}:
        return byte_fallback_bytes
    raise TokenizerError(
        f"the decoder of tokenizer.json is {', '.join(sorted(kinds)) or 'missing'}; supported are "
        "ByteLevel, ByteFallback and Metaspace. Use a model with one of these"
    )


def _decoder_kinds(decoder: object) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    nested = [_decoder_kinds(each) for each in decoder.get("decoders", [])]
    return {str(decoder.get("type"))}.union(*nested) - {"Sequence"}
