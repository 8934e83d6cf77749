"""Which part of a model one rank has. Pure.

q, k, v, gate and up are split by their outputs and the LM head by tokens; the output projection and
down are split by their inputs, so that a rank reads what it computed itself: every rank has a part
of every expert. Everything else, the embedding among it, is whole on every rank. Where there are
more ranks than KV heads, neighbouring ranks have the same one.
"""

import math
import re
from dataclasses import dataclass, replace

from pagewire.engine.config import ModelConfig
from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Part
from pagewire.engine.mixture_config import MixtureConfig
from pagewire.engine.parallel.rank_group import split_evenly
from pagewire.kernels.ops import GROUP
from pagewire.kv_transfer.layout import LayoutError
from pagewire.kv_transfer.reshard import HeadSplit

_LAYER_TENSOR = re.compile(r"model\.layers\.\d+\.([a-z0-9_.]+)\.(weight|bias)")
_FEED_FORWARD = re.compile(r"mlp\.(?:(experts)\.\d+\.|(shared_expert)\.)?(gate|up|down)_proj")
_WHOLE = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate",
    "mlp.shared_expert_gate",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShard:
    """The part of `rank`. Raises ModelError, which names the sizes, for what cannot be split."""

    config: ModelConfig  # of the whole model
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        config = self.config
        for name, count in {"num_heads": config.num_heads, **self._widths}.items():
            if count % self.size:
                raise ModelError(
                    f"tensor_parallel_size is {self.size}; it must divide {name}, which is "
                    f"{count}. {self._remedy}"
                )
        try:
            HeadSplit(num_kv_heads=config.num_kv_heads, degree=self.size)
        except LayoutError as error:
            raise ModelError(
                f"tensor_parallel_size is {self.size}; it must divide num_kv_heads, which is "
                f"{config.num_kv_heads}, or be a multiple. {self._remedy}"
            ) from error
        if not split_evenly(config.vocab_size, self.size, self.size - 1):
            raise ModelError(
                f"tensor_parallel_size is {self.size}: some rank would have none of the "
                f"{config.vocab_size} tokens. Choose a smaller one"
            )

    @property
    def rank_config(self) -> ModelConfig:
        """The sizes of what this rank computes; vocab_size is that of the embedding."""
        return replace(
            self.config,
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=self.config.intermediate_size // self.size,
            mixture=self._rank_mixture,
        )

    @property
    def heads(self) -> range:
        return split_evenly(self.config.num_heads, self.size, self.rank)

    @property
    def kv_heads(self) -> range:
        split = HeadSplit(num_kv_heads=self.config.num_kv_heads, degree=self.size)
        return split.heads(self.rank)

    @property
    def vocabulary(self) -> range:
        """Token ids whose logits this rank computes."""
        return split_evenly(self.config.vocab_size, self.size, self.rank)

    def require_whole_groups(self) -> None:
        """Raise ModelError when quantised matrices would be cut within a group of inputs."""
        inputs = {
            "num_heads * head_dim": self.config.num_heads * self.config.head_dim,
            **self._widths,
        }
        for name, count in inputs.items():
            if count % (self.size * GROUP):
                raise ModelError(
                    f"tensor_parallel_size is {self.size} and {name} is {count}: of a quantised "
                    f"matrix each rank needs whole groups of {GROUP} inputs; choose another "
                    "tensor_parallel_size, or quantization none"
                )

    def part(self, name: str) -> Part | None:
        """What of a tensor this rank has; None stands for all of it.

        Raises ModelError for a tensor that nobody said how to split.
        """
        config = self.config
        of_layer = _LAYER_TENSOR.fullmatch(name)
        module = of_layer.group(1) if of_layer else name
        if network := _FEED_FORWARD.fullmatch(module):
            return self._part_of_network(*network.groups())
        match module:
            case "self_attn.q_proj":
                return self._part_of_heads(0, self.heads, config.num_heads)
            case "self_attn.k_proj" | "self_attn.v_proj":
                return self._part_of_heads(0, self.kv_heads, config.num_kv_heads)
            case "self_attn.o_proj":
                return self._part_of_heads(1, self.heads, config.num_heads)
            case "lm_head.weight":
                return self.lm_head_part
            case _ if module in _WHOLE:
                return None
        raise ModelError(
            f"tensor {name} cannot be split among ranks; set tensor_parallel_size to 1"
        )

    @property
    def lm_head_part(self) -> Part:
        """Of the matrix that gives logits, an embedding perhaps."""
        return Part(dim=0, index=self.vocabulary, size=self.config.vocab_size)

    @property
    def _remedy(self) -> str:
        """The sizes that heads and networks can be split for."""
        common = math.gcd(self.config.num_heads, *self._widths.values())
        kv_heads = self.config.num_kv_heads
        sizes = [
            size
            for size in range(1, common + 1)
            if common % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
        ]
        return f"Choose {' or '.join(map(str, sizes))}"

    @property
    def _widths(self) -> dict[str, int]:
        """Of each kind of feed-forward network, the features between gate and up, and down."""
        widths = {"intermediate_size": self.config.intermediate_size}
        mixture = self.config.mixture
        if mixture is not None:
            widths["moe_intermediate_size"] = mixture.intermediate_size
            if mixture.shared_intermediate_size is not None:
                widths["shared_expert_intermediate_size"] = mixture.shared_intermediate_size
        return widths

    @property
    def _rank_mixture(self) -> MixtureConfig | None:
        mixture = self.config.mixture
        if mixture is None:
            return None
        shared = mixture.shared_intermediate_size
        return replace(
            mixture,
            intermediate_size=mixture.intermediate_size // self.size,
            shared_intermediate_size=None if shared is None else shared // self.size,
        )

    def _part_of_network(self, expert: str | None, shared: str | None, matrix: str) -> Part:
        """Of a matrix of a feed-forward network: an expert's, the shared expert's or a dense one's.

        `matrix`: gate, up or down.
        """
        name = "shared_expert_intermediate_size" if shared else "intermediate_size"
        width = self._widths["moe_intermediate_size" if expert else name]
        index = split_evenly(width, self.size, self.rank)
        return Part(dim=1 if matrix == "down" else 0, index=index, size=width)

    def _part_of_heads(self, dim: int, heads: range, num_heads: int) -> Part:
        head_dim = self.config.head_dim
        index = range(heads.start * head_dim, heads.stop * head_dim)
        return Part(dim=dim, index=index, size=num_heads * head_dim)
