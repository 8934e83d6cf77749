"""The decoder of Llama, Mistral, Qwen2 and Qwen3: one forward step over a ragged batch.

The families differ in three switches of the config (a bias on q, k and v; a norm on each head of q
and k; a sliding window) and otherwise in sizes only. All arithmetic is behind `ops`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.engine.config import ModelConfig
from pagewire.engine.models.rope import cosine_and_sine
from pagewire.kernels.ops import AttentionBatch, AttentionPlan, Ops


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    """Matrices are [out_features, in_features]."""

    input_norm: Tensor
    qkv: Tensor  # q, k and v below one another
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    output: Tensor
    post_attention_norm: Tensor
    gate_up: Tensor  # gate above up
    down: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LlamaWeights:
    embedding: Tensor  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Tensor  # [vocab_size, hidden_size]; the embedding itself when tied


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """What all layers of one forward step share."""

    attention: AttentionPlan
    rope: tuple[Tensor, Tensor]
    pool: Tensor
    slots: Tensor


class LlamaModel:
    """A loaded model. Holds no state of any sequence: that is in the KV pool."""

    def __init__(
        self, config: ModelConfig, weights: LlamaWeights, inverse_frequencies: Tensor, ops: Ops
    ) -> None:
        self.config = config
        self._weights = weights
        self._inverse_frequencies = inverse_frequencies
        self._ops = ops

    @property
    def device(self) -> str:
        return str(self._weights.embedding.device)

    def forward(
        self, token_ids: Tensor, batch: AttentionBatch, pool: Tensor, logits_of: Tensor
    ) -> Tensor:
        """Run the tokens of a step, storing their KV, and return logits of some of them.

        token_ids: int64 [num_tokens]; pool: as in `Ops.rope_and_store`; logits_of: int64
        [num_logits], indices into the tokens. Returns float32 [num_logits, vocab_size].
        """
        ops, config, weights = self._ops, self.config, self._weights
        step = _Step(
            attention=ops.plan_attention(
                batch, scale=config.head_dim**-0.5, window=config.sliding_window
            ),
            rope=cosine_and_sine(batch.positions, self._inverse_frequencies),
            pool=pool,
            slots=batch.slots,
        )
        residual = weights.embedding[token_ids]  # [num_tokens, hidden_size]
        x = ops.rms_norm(residual, weights.layers[0].input_norm, config.rms_norm_eps)
        next_norms = [layer.input_norm for layer in weights.layers[1:]] + [weights.norm]
        for index, (layer, next_norm) in enumerate(zip(weights.layers, next_norms, strict=True)):
            x = self._attend(x, index, layer, step)
            x, residual = ops.add_rms_norm(
                x, residual, layer.post_attention_norm, config.rms_norm_eps
            )
            x = ops.linear(ops.silu_mul(ops.linear(x, layer.gate_up)), layer.down)
            x, residual = ops.add_rms_norm(x, residual, next_norm, config.rms_norm_eps)
        return ops.linear(x[logits_of], weights.lm_head).float()

    def _attend(self, x: Tensor, index: int, layer: LayerWeights, step: _Step) -> Tensor:
        """Project to q, k and v, store k and v, attend, project back; x: [num_tokens, hidden]."""
        ops, config = self._ops, self.config
        heads = ops.linear(x, layer.qkv, layer.qkv_bias).view(len(x), -1, config.head_dim)
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = torch.split(heads, sizes, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = ops.rms_norm(k, layer.k_norm, config.rms_norm_eps)
        q = ops.rope_and_store(q, k, v, step.rope, step.pool, index, step.slots)
        return ops.linear(step.attention.run(q, step.pool, index).flatten(1), layer.output)
