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
from pagewire.engine.loading.gguf import GGUFCheckpoint
from pagewire.engine.loading.linears import LinearLoader
from pagewire.engine.loading.safetensors import SafetensorsCheckpoint
from pagewire.engine.models.llama import LayerWeights, LlamaModel, LlamaWeights
from pagewire.engine.models.rope import inverse_frequencies
from pagewire.engine.parallel.rank_group import RankGroup, SingleRank
from pagewire.engine.parallel.shard import ModelShard
from pagewire.engine.parallel.sharded_checkpoint import ShardedCheckpoint
from pagewire.engine.quantization import Quantization
from pagewire.kernels.ops import Linear
from pagewire.kernels.select import SelectedOps

logger = logging.getLogger(__name__)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a safetensors directory. Raises ModelError."""
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.is_file():
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
    checkpoint does not have, and for a model that cannot be split among so many ranks.
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
    logger.info("matrices: %s", linears.explanation)
    weights = _Loader(linears, checkpoint.config, shard.vocabulary).weights()
    linears.check_used()
    frequencies = inverse_frequencies(checkpoint.config, checkpoint.rope_factors())
    return LlamaModel(checkpoint.config, weights, frequencies.to(device), selected.ops, group)


class _Loader:
    """Names the tensors that the config asks for, fused as the decoder wants them."""

    def __init__(self, linears: LinearLoader, config: ModelConfig, vocabulary: range) -> None:
        """`vocabulary`: the tokens whose logits this rank computes."""
        self._linears = linears
        self._tensor = linears.tensor
        self._config = config
        self._vocabulary = vocabulary

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
        gate_up = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        return LayerWeights(
            input_norm=self._tensor(f"{layer}.input_layernorm.weight", hidden),
            qkv=self._linear(f"{layer}.self_attn", qkv, hidden, bias=config.qkv_bias),
            q_norm=self._head_norm(f"{layer}.self_attn.q_norm.weight"),
            k_norm=self._head_norm(f"{layer}.self_attn.k_norm.weight"),
            output=self._linear(f"{layer}.self_attn", {"o_proj": hidden}, q_rows),
            post_attention_norm=self._tensor(f"{layer}.post_attention_layernorm.weight", hidden),
            gate_up=self._linear(f"{layer}.mlp", gate_up, hidden),
            down=self._linear(f"{layer}.mlp", {"down_proj": hidden}, config.intermediate_size),
        )

    def _linear(
        self, module: str, rows: dict[str, int], in_features: int, *, bias: bool = False
    ) -> Linear:
        full_names = {f"{module}.{part}": count for part, count in rows.items()}
        return self._linears.linear(full_names, in_features, bias=bias)

    def _head_norm(self, name: str) -> Tensor | None:
        return self._tensor(name, self._config.head_dim) if self._config.qk_norm else None
