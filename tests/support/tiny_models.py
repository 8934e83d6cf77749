"""Tiny random models of each family, made by transformers and saved as safetensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}
VOCAB_SIZE = 199
MAX_MODEL_LEN = 2048


def tiny_model(family: str) -> Any:
    """A random transformers model with 2 layers, 4 heads, 2 KV heads; the same at every call."""
    torch.manual_seed(7)
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=False,
        initializer_range=0.3,  # spread logits, so that greedy choices are no near-ties
        **extra,
    )
    return model_class(config).eval()


def greedy_tokens(family: str, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What transformers generates."""
    output = tiny_model(family).generate(
        torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def save_tiny_model(family: str, folder: Path) -> Path:
    """Save `tiny_model(family)` for our loader; returns `folder`."""
    tiny_model(family).save_pretrained(folder)
    return folder
