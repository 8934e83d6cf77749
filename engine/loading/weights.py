"""From files on disk to a model that can run.

Every tensor is converted straight into its place in the fused matrices, one after another, so that
loading takes little more memory than the model.
"""

from pathlib import Path

import torch
from torch import Tensor

from pagewire.engine.errors import ModelError
from pagewire.engine.loading.checkpoint import Checkpoint
from pagewire.engine.loading.gguf import GGUFCheckpoint
from pagewire.engine.loading.safetensors import SafetensorsCheckpoint
from pagewire.engine.models.llama import LayerWeights, LlamaModel, LlamaWeights
from pagewire.engine.models.rope import inverse_frequencies
from pagewire.kernels.linear import DenseLinear
from pagewire.kernels.ops import Linear, Ops


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a safetensors directory. Raises ModelError."""
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.is_file():
        return GGUFCheckpoint(path)
    raise ModelError(f"model {path} does not exist")


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, ops: Ops) -> LlamaModel:
    """Convert the tensors of an open checkpoint and make the decoder that its config describes.

    Raises ModelError when a tensor is missing, misshapen or of a type that is not supported.
    """
    weights = _Loader(checkpoint, dtype, device).weights()
    frequencies = inverse_frequencies(checkpoint.config, checkpoint.rope_factors())
    return LlamaModel(checkpoint.config, weights, frequencies.to(device), ops)


class _Loader:
    """Reads the tensors that the config asks for, fused as the decoder wants them."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._dtype = dtype
        self._device = device

    def weights(self) -> LlamaWeights:
        config = self._config
        embedding = self._tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            lm_head = embedding
        else:
            lm_head = self._tensor("lm_head.weight", config.vocab_size, config.hidden_size)
        return LlamaWeights(
            embedding=embedding,
            layers=tuple(self._layer(index) for index in range(config.num_layers)),
            norm=self._tensor("model.norm.weight", config.hidden_size),
            lm_head=DenseLinear(weight=lm_head),
        )

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

    def _head_norm(self, name: str) -> Tensor | None:
        return self._tensor(name, self._config.head_dim) if self._config.qk_norm else None

    def _tensor(self, name: str, *shape: int) -> Tensor:
        tensor = self._empty(*shape)
        self._checkpoint.read(name, tensor)
        return tensor

    def _linear(
        self, module: str, rows: dict[str, int], in_features: int, *, bias: bool = False
    ) -> Linear:
        """The projections of `rows` as one matrix, their outputs behind one another."""
        return DenseLinear(
            weight=self._fused(module, rows, "weight", in_features),
            bias=self._fused(module, rows, "bias") if bias else None,
        )

    def _fused(self, module: str, rows: dict[str, int], kind: str, *columns: int) -> Tensor:
        """The projections of `rows` below one another: [sum of rows, *columns]."""
        fused = self._empty(sum(rows.values()), *columns)
        for part, into in zip(rows, torch.split(fused, list(rows.values())), strict=True):
            self._checkpoint.read(f"{module}.{part}.{kind}", into)
        return fused

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)
