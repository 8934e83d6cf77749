"""From files on disk to a model that can run.

Here are the names of the tensors and how they are fused; `linears` decides how they are stored.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from pagewire.engine.config import ModelConfig
from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Checkpoint
from pagewire.engine.loading.linears import LinearLoader
from pagewire.engine.loading.safetensors import SafetensorsCheckpoint
from pagewire.engine.mixture_config import MixtureConfig
from pagewire.engine.models.feed_forward import (
    DenseFeedForward,
    FeedForward,
    MixtureOfExperts,
    SharedExpert,
)
from pagewire.engine.models.llama import LayerWeights, LlamaModel, LlamaWeights
from pagewire.engine.models.rope import inverse_frequencies
from pagewire.engine.parallel.rank_group import RankGroup, SingleRank
from pagewire.engine.parallel.shard import ModelShard
from pagewire.engine.parallel.sharded_checkpoint import ShardedCheckpoint
from pagewire.engine.quantization import Quantization
from pagewire.kernels.experts import Experts
from pagewire.kernels.ops import Linear
from pagewire.kernels.select import SelectedOps

logger = logging.getLogger(__name__)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a safetensors directory. Raises ModelError."""
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.is_file():
        # Only for such a file: its library may be missing where models are safetensors.
        from pagewire.engine.loading.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    raise ModelError(f"model {path} does not exist")


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str,
    selected: SelectedOps,
    quantization: Quantization = Quantization.NONE,
    group: RankGroup | None = None,
) -> LlamaModel:
    """Convert the tensors of an open checkpoint and make the decoder that its config describes.

    Of a `group` each rank reads and makes its own part. Raises ModelError when a tensor is missing,
    misshapen or of a type that is not supported, for a quantization that this device, `selected` or
    checkpoint does not have, and for a model that cannot be split among so many ranks; KernelError
    for a quantization that no kernel here multiplies.
    """
    group = group or SingleRank()
    shard = ModelShard(config=checkpoint.config, rank=group.rank, size=group.size)
    if group.size > 1:
        if quantization is not Quantization.NONE:
            shard.require_whole_groups()
        checkpoint = ShardedCheckpoint(checkpoint, shard)
    linears = LinearLoader(
        checkpoint, dtype=dtype, device=device, quantization=quantization, selected=selected
    )
    held = checkpoint.quantized_as
    logger.info("matrices: %s%s", linears.explanation, f"; the files hold {held}" if held else "")
    weights = _Loader(linears, checkpoint.config, shard.vocabulary, selected).weights()
    linears.finish()
    frequencies = inverse_frequencies(checkpoint.config, checkpoint.rope_factors())
    return LlamaModel(checkpoint.config, weights, frequencies.to(device), selected.ops, group)


class _Loader:
    """Names the tensors that the config asks for, fused as the decoder wants them."""

    def __init__(
        self,
        linears: LinearLoader,
        config: ModelConfig,
        vocabulary: range,
        selected: SelectedOps,
    ) -> None:
        """`vocabulary`: the tokens whose logits this rank computes."""
        self._linears = linears
        self._tensor = linears.tensor
        self._config = config
        self._vocabulary = vocabulary
        self._ops = selected.ops

    def weights(self) -> LlamaWeights:
        config = self._config
        embedding = self._tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        return LlamaWeights(
            embedding=embedding,
            layers=tuple(self._layer(index) for index in range(config.num_layers)),
            norm=self._tensor("model.norm.weight", config.hidden_size),
            lm_head=self._lm_head(embedding),
        )

    def _lm_head(self, embedding: Tensor) -> Linear:
        config = self._config
        if config.tie_word_embeddings:
            rows = embedding[self._vocabulary.start : self._vocabulary.stop]
            return self._linears.tied_lm_head("model.embed_tokens", rows)
        return self._linears.lm_head("lm_head", len(self._vocabulary), config.hidden_size)

    def _layer(self, index: int) -> LayerWeights:
        config = self._config
        layer = f"model.layers.{index}"
        hidden, head_dim = config.hidden_size, config.head_dim
        kv_rows = config.num_kv_heads * head_dim
        q_rows = config.num_heads * head_dim
        qkv = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        return LayerWeights(
            input_norm=self._tensor(f"{layer}.input_layernorm.weight", hidden),
            qkv=self._linear(f"{layer}.self_attn", qkv, hidden, bias=config.qkv_bias),
            q_norm=self._head_norm(f"{layer}.self_attn.q_norm.weight"),
            k_norm=self._head_norm(f"{layer}.self_attn.k_norm.weight"),
            output=self._linear(f"{layer}.self_attn", {"o_proj": hidden}, q_rows),
            post_attention_norm=self._tensor(f"{layer}.post_attention_layernorm.weight", hidden),
            feed_forward=self._feed_forward(f"{layer}.mlp", index),
        )

    def _feed_forward(self, module: str, index: int) -> FeedForward:
        mixture = self._config.mixture
        if mixture is None or index in mixture.dense_layers:
            return self._dense(module, self._config.intermediate_size)
        return MixtureOfExperts(
            router=self._linears.router(
                f"{module}.gate", mixture.num_experts, self._config.hidden_size
            ),
            experts=self._experts(f"{module}.experts", mixture),
            shared=self._shared_expert(module, mixture),
            experts_per_token=mixture.experts_per_token,
            renormalize=mixture.renormalize,
            ops=self._ops,
        )

    def _experts(self, module: str, mixture: MixtureConfig) -> Experts:
        experts = [
            self._gated(f"{module}.{expert}", mixture.intermediate_size)
            for expert in range(mixture.num_experts)
        ]
        gate_up, down = zip(*experts, strict=True)
        return self._linears.experts(gate_up, down)

    def _shared_expert(self, module: str, mixture: MixtureConfig) -> SharedExpert | None:
        if mixture.shared_intermediate_size is None:
            return None
        return SharedExpert(
            gate=self._linears.router(f"{module}.shared_expert_gate", 1, self._config.hidden_size),
            network=self._dense(f"{module}.shared_expert", mixture.shared_intermediate_size),
        )

    def _dense(self, module: str, size: int) -> DenseFeedForward:
        gate_up, down = self._gated(module, size)
        return DenseFeedForward(gate_up=gate_up, down=down, ops=self._ops)

    def _gated(self, module: str, size: int) -> tuple[Linear, Linear]:
        """gate and up as one matrix, and down, of a feed-forward network of so many features."""
        hidden = self._config.hidden_size
        gate_up = self._linear(module, {"gate_proj": size, "up_proj": size}, hidden)
        return gate_up, self._linear(module, {"down_proj": hidden}, size)

    def _linear(
        self, module: str, rows: dict[str, int], in_features: int, *, bias: bool = False
    ) -> Linear:
        full_names = {f"{module}.{part}": count for part, count in rows.items()}
        return self._linears.linear(full_names, in_features, bias=bias)

    def _head_norm(self, name: str) -> Tensor | None:
        return self._tensor(name, self._config.head_dim) if self._config.qk_norm else None
