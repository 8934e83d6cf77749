"""What a model is, whichever file said so: sizes, rope, and the few switches between families.

Parsed from a Hugging Face config.json or from GGUF metadata, with everything refused here that the
decoder would compute wrongly. Knows no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pagewire.engine.config_fields import Fields
from pagewire.engine.errors import ModelError
from pagewire.engine.mixture_config import MixtureConfig, mixture_from_hugging_face

ARCHITECTURES = (
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral models come as llama
ROPE_TYPES = ("default", "linear", "llama3")
MISTRAL_WINDOW = 4096  # where config.json does not say
MIXTRAL_ROPE_THETA = 1_000_000.0  # likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope:
    """Positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family. Raises ModelError when a size cannot be."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of layers that have one feed-forward network for all tokens
    mixture: MixtureConfig | None  # of the other layers; None: there are none
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: LinearRope | Llama3Rope | None
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None  # positions that a token sees, its own included; None: all
    tie_word_embeddings: bool
    max_model_len: int  # prompt and output tokens together

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_model_len",
        ):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, "
                f"which is {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim is {self.head_dim}; rope needs an even number")


def from_hugging_face(values: Mapping[str, Any]) -> ModelConfig:
    """The config of a parsed config.json, in the form of transformers 4 or 5.

    Raises ModelError when the architecture, or something that it needs, is not supported, and when
    a value is missing or of the wrong type.
    """
    architecture = values.get("model_type")
    if architecture not in ARCHITECTURES:
        raise _unsupported("architecture", architecture, ARCHITECTURES)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"the rope parameters are {rope!r}; they must be a JSON object")
    values = {**values, **rope}
    _refuse_hugging_face_variants(values)
    fields = Fields(values)
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    # Where the families differ in what a missing value means, the file must have it.
    default_kv_heads = num_heads if architecture in ("llama", "phi3") else None
    default_head_dim = hidden_size // max(num_heads, 1) if architecture != "qwen3" else None
    default_theta = MIXTRAL_ROPE_THETA if architecture == "mixtral" else 10_000.0
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        mixture=mixture_from_hugging_face(architecture, fields),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", default_kv_heads),
        head_dim=fields.integer("head_dim", default_head_dim),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=fields.number("rope_theta", default_theta),
        rope_scaling=_hugging_face_rope(Fields(rope)),
        qkv_bias=_hugging_face_qkv_bias(architecture, fields),
        qk_norm=architecture in ("qwen3", "qwen3_moe"),
        sliding_window=_hugging_face_window(architecture, values),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        max_model_len=fields.integer("max_position_embeddings"),
    )


def from_gguf(metadata: Mapping[str, Any], *, vocab_size: int, tied: bool) -> ModelConfig:
    """The config of a GGUF file's scalar metadata.

    `vocab_size` is the number of embedding rows; `tied` says that the file has no LM head of its
    own. Raises ModelError as `from_hugging_face` does.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise _unsupported("architecture", architecture, GGUF_ARCHITECTURES)
    fields = Fields(metadata, prefix=f"{architecture}.")
    if fields.integer("expert_count", 0):
        raise ModelError(
            "a mixture of experts is not supported in this format; choose a directory of "
            "safetensors files, or a dense model"
        )
    num_heads = fields.integer("attention.head_count")
    hidden_size = fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden_size // max(num_heads, 1))
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise ModelError("rope on a part of each head is not supported")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        mixture=None,
        num_layers=fields.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number("rope.freq_base", 10_000.0),
        rope_scaling=_gguf_rope(fields),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        sliding_window=fields.integer("attention.sliding_window", 0) or None,
        tie_word_embeddings=tied,
        max_model_len=fields.integer("context_length"),
    )


def _unsupported(what: str, value: object, supported: tuple[str, ...]) -> ModelError:
    return ModelError(f"{what} {value!r} is not supported; supported are {', '.join(supported)}")


def _refuse_hugging_face_variants(values: Mapping[str, Any]) -> None:
    """Raise ModelError for a switch of config.json that changes what the decoder must compute."""
    for name, supported in (
        ("hidden_act", "silu"),
        ("mlp_bias", False),
        ("partial_rotary_factor", 1.0),
    ):
        if values.get(name, supported) not in (supported, None):
            raise ModelError(f"{name} is {values[name]!r}; only {supported!r} is supported")
    if values.get("attention_bias", False) and values["model_type"] != "qwen2":
        raise ModelError("attention_bias is True; only qwen2 has a bias there")


def _hugging_face_rope(fields: Fields) -> LinearRope | Llama3Rope | None:
    kind = fields.string("rope_type", fields.string("type", "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearRope(factor=fields.number("factor"))
        case "llama3":
            return Llama3Rope(
                factor=fields.number("factor"),
                low_freq_factor=fields.number("low_freq_factor"),
                high_freq_factor=fields.number("high_freq_factor"),
                original_max_position_embeddings=fields.integer("original_max_position_embeddings"),
            )
    raise _unsupported("rope type", kind, ROPE_TYPES)


def _hugging_face_qkv_bias(architecture: str, fields: Fields) -> bool:
    if architecture == "qwen2_moe":
        return fields.flag("qkv_bias", True)
    return architecture == "qwen2"


def _hugging_face_window(architecture: str, values: Mapping[str, Any]) -> int | None:
    """The sliding window, which all layers must share."""
    if architecture == "llama":
        return None
    if values.get("sliding_window", MISTRAL_WINDOW) is None:
        return None
    fields = Fields(values)
    if architecture == "mistral":
        return fields.integer("sliding_window", MISTRAL_WINDOW)
    if architecture in ("mixtral", "phi3"):
        return fields.integer("sliding_window") if "sliding_window" in values else None
    if not values.get("use_sliding_window"):
        return None
    if architecture == "qwen3_moe":
        return fields.integer("sliding_window")
    if architecture == "qwen2_moe":
        raise ModelError("use_sliding_window is True; of qwen2_moe only False is supported")
    num_layers, first = fields.integer("num_hidden_layers"), fields.integer("max_window_layers")
    if 0 < first < num_layers:
        raise ModelError(
            f"max_window_layers is {first} of {num_layers}; "
            "a sliding window in some layers only is not supported"
        )
    return fields.integer("sliding_window") if first == 0 else None


def _gguf_rope(fields: Fields) -> LinearRope | None:
    """Llama 3's rope is not in the metadata: its factors are a tensor of the file."""
    kind = fields.string("rope.scaling.type", "none")
    match kind:
        case "none":
            return None
        case "linear":
            return LinearRope(factor=fields.number("rope.scaling.factor"))
    raise _unsupported("rope type", kind, ("none", "linear"))
