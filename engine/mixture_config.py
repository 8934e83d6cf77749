"""What a mixture of experts is, as config.json says it for Mixtral, Qwen2-MoE and Qwen3-MoE.

Knows no torch.
"""

from dataclasses import dataclass

from pagewire.engine.config_fields import Fields
from pagewire.engine.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """The experts of all layers but the dense ones. Raises ModelError when a size cannot be."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of each expert
    renormalize: bool  # the weights of a token's experts sum to 1
    # Features of the one expert that every token goes through besides; None: there is none.
    shared_intermediate_size: int | None
    dense_layers: frozenset[int]  # those with one feed-forward network for all tokens

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ModelError(
                f"num_experts_per_tok is {self.experts_per_token}; it must be 1 to the number of "
                f"experts, which is {self.num_experts}"
            )
        for size in (self.intermediate_size, self.shared_intermediate_size):
            if size is not None and size < 1:
                raise ModelError(f"an expert's intermediate size is {size}; it must be at least 1")


def mixture_from_hugging_face(architecture: str, fields: Fields) -> MixtureConfig | None:
    """The mixture of a config.json; None for a dense architecture. Raises ModelError."""
    match architecture:
        case "mixtral":
            return MixtureConfig(
                num_experts=fields.integer("num_local_experts"),
                experts_per_token=fields.integer("num_experts_per_tok"),
                intermediate_size=fields.integer("intermediate_size"),
                renormalize=True,
                shared_intermediate_size=None,
                dense_layers=frozenset(),
            )
        case "qwen2_moe" | "qwen3_moe":
            shared = architecture == "qwen2_moe"
            return MixtureConfig(
                num_experts=_num_experts(fields),
                experts_per_token=fields.integer("num_experts_per_tok"),
                intermediate_size=fields.integer("moe_intermediate_size"),
                renormalize=fields.flag("norm_topk_prob", False),
                shared_intermediate_size=(
                    fields.integer("shared_expert_intermediate_size") if shared else None
                ),
                dense_layers=_dense_layers(fields),
            )
    return None


def _num_experts(fields: Fields) -> int:
    """Under the name of transformers 4, or that of transformers 5."""
    return fields.integer("num_experts", fields.optional_integer("num_local_experts"))


def _dense_layers(fields: Fields) -> frozenset[int]:
    """Those that are listed, and those between every `decoder_sparse_step`-th layer."""
    step = fields.integer("decoder_sparse_step", 1)
    if step < 1:
        raise ModelError(f"decoder_sparse_step is {step}; it must be at least 1")
    layers = range(fields.integer("num_hidden_layers"))
    between = {index for index in layers if (index + 1) % step}
    return frozenset(between.union(fields.integers("mlp_only_layers")))
