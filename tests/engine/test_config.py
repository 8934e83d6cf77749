"""What is read from config.json, and what is refused rather than computed wrongly."""

from typing import Any

import pytest

from pagewire.engine.config import LinearRope, Llama3Rope, from_gguf, from_hugging_face
from pagewire.engine.errors import ModelError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 4,
    "llama.context_length": 2048,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def test_a_plain_llama() -> None:
    config = from_hugging_face(LLAMA)
    assert config.head_dim == 8
    assert config.num_kv_heads == 2
    assert config.rope_theta == 10_000.0
    assert config.rope_scaling is None
    assert config.sliding_window is None
    assert not (config.qkv_bias or config.qk_norm or config.tie_word_embeddings)


def test_a_plain_gguf_gives_the_same_config() -> None:
    assert from_gguf(GGUF, vocab_size=100, tied=False) == from_hugging_face(LLAMA)


def test_rope_in_the_form_of_transformers_4_and_5() -> None:
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    four = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}}
    five = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}}
    configs = [from_hugging_face({**LLAMA, **form}) for form in (four, five)]
    assert configs[0] == configs[1]
    assert configs[0].rope_theta == 5e5
    assert isinstance(configs[0].rope_scaling, Llama3Rope)


def test_linear_rope_in_its_old_and_gguf_form() -> None:
    old = from_hugging_face({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = from_gguf(
        {**GGUF, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        vocab_size=100,
        tied=False,
    )
    assert old == new
    assert old.rope_scaling == LinearRope(factor=2.0)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 512}, 512),
        ({"model_type": "phi3"}, None),
        ({"model_type": "phi3", "sliding_window": 2047}, 2047),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False}, None),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 512,
                "use_sliding_window": True,
                "max_window_layers": 0,
            },
            512,
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 512,
                "use_sliding_window": True,
                "max_window_layers": 4,
            },
            None,
        ),
        ({"sliding_window": 512}, None),
    ],
)
def test_the_sliding_window(values: dict[str, Any], window: int | None) -> None:
    assert from_hugging_face({**LLAMA, **values}).sliding_window == window


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model_type": None}, "architecture None is not supported; supported are llama"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be an integer"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'; it must be a number"),
        ({"num_hidden_layers": 0}, "num_layers is 0; it must be at least 1"),
        ({"num_key_value_heads": 3}, "num_heads is 8; it must be a multiple of num_kv_heads"),
        ({"head_dim": 7}, "head_dim is 7; rope needs an even number"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"mlp_bias": True}, "mlp_bias is True; only False is supported"),
        ({"attention_bias": True}, "attention_bias is True; only qwen2 has a bias there"),
        ({"rope_scaling": [1]}, "rope parameters are .*; they must be a JSON object"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope type 'yarn' is not supported; supported are default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "has no factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 512,
                "use_sliding_window": True,
                "max_window_layers": 2,
            },
            "max_window_layers is 2 of 4; a sliding window in some layers only",
        ),
        ({"model_type": "qwen3"}, "has no head_dim"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"model_type": "gemma2"}, "architecture 'gemma2' is not supported; supported are llama"),
    ],
)
def test_what_cannot_be_served_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        from_hugging_face({**LLAMA, **values})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope type 'yarn' is not supported"),
        ({"llama.rope.dimension_count": 4}, "rope on a part of each head"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.block_count": None}, r"has no llama\.block_count"),
        ({"general.architecture": "gemma"}, "architecture 'gemma' is not supported"),
    ],
)
def test_what_a_gguf_file_cannot_have(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        from_gguf({**GGUF, **values}, vocab_size=100, tied=False)
