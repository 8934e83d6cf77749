"""Tiny random models of each family, made and saved by transformers, the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 193
MAX_MODEL_LEN = 1100


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A transformers model class with a configuration that exercises it."""

    model: type[PreTrainedModel]
    config: type[Any]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedModel:
    """A tiny model on disk, and the same in memory."""

    path: Path
    reference: PreTrainedModel


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}

FAMILIES = {
    "llama": Family(model=LlamaForCausalLM, config=LlamaConfig, options={}),
    "llama tied": Family(
        model=LlamaForCausalLM, config=LlamaConfig, options={"tie_word_embeddings": True}
    ),
    "llama3 rope": Family(
        model=LlamaForCausalLM, config=LlamaConfig, options={"rope_parameters": LLAMA3_ROPE}
    ),
    "linear rope": Family(
        model=LlamaForCausalLM, config=LlamaConfig, options={"rope_parameters": LINEAR_ROPE}
    ),
    "mistral": Family(
        model=MistralForCausalLM, config=MistralConfig, options={"sliding_window": None}
    ),
    "mistral window": Family(
        model=MistralForCausalLM, config=MistralConfig, options={"sliding_window": 100}
    ),
    "qwen2": Family(model=Qwen2ForCausalLM, config=Qwen2Config, options={}),
    "qwen3": Family(model=Qwen3ForCausalLM, config=Qwen3Config, options={}),
    "phi3": Family(
        model=Phi3ForCausalLM, config=Phi3Config, options={"hidden_size": 96, "pad_token_id": None}
    ),
    "phi3 window": Family(
        model=Phi3ForCausalLM,
        config=Phi3Config,
        options={"hidden_size": 96, "pad_token_id": None, "sliding_window": 100},
    ),
    "mixtral": Family(
        model=MixtralForCausalLM, config=MixtralConfig, options={"num_local_experts": 5}
    ),
    "qwen2 moe": Family(
        model=Qwen2MoeForCausalLM,
        config=Qwen2MoeConfig,
        options={
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
        },
    ),
    "qwen3 moe": Family(
        model=Qwen3MoeForCausalLM,
        config=Qwen3MoeConfig,
        options={
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}


def make_model(name: str, directory: Path, **options: Any) -> PreTrainedModel:
    """Save a tiny random float32 model of a family to `directory` and return it.

    Its weights are far larger than a fresh model's, so that attention and the greedy choice depend
    sharply on every token.
    """
    torch.manual_seed(0)
    family = FAMILIES[name]
    config = family.config(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": MAX_MODEL_LEN,
            "initializer_range": 0.2,
            **family.options,
            **options,
        }
    )
    model: PreTrainedModel = family.model(config)
    model.train(False)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return model


def greedy_tokens(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What transformers generates, end-of-sequence tokens ignored."""
    generate: Any = model.generate
    output = generate(
        torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens
