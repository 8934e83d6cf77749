"""The decoder of Llama, Mistral, Phi-3, Qwen and their mixtures: a step over a ragged batch.

The families differ in three switches of the config (a bias on q, k and v; a norm on each head of q
and k; a sliding window), in the feed-forward network of a layer, and otherwise in sizes only. All
arithmetic is behind `Ops`, `Linear` and `FeedForward`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pagewire.engine.config import ModelConfig
from pagewire.engine.models.feed_forward import FeedForward
from pagewire.engine.models.rope import cosine_and_sine
from pagewire.engine.parallel.rank_group import RankGroup, SingleRank
from pagewire.kernels.kv_pool import KVPool
from pagewire.kernels.linear import DenseLinear
from pagewire.kernels.ops import Activation, AttentionBatch, AttentionPlan, Linear, Ops


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    """The matrices of one layer, each with its bias, and the norms between them."""

    input_norm: Tensor  # [hidden_size]
    qkv: Linear  # outputs q, k and v behind one another
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    output: Linear
    post_attention_norm: Tensor  # [hidden_size]
    feed_forward: FeedForward

    @property
    def num_bytes(self) -> int:
        return self.qkv.num_bytes + self.output.num_bytes + self.feed_forward.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LlamaWeights:
    embedding: Tensor  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden_size]
    lm_head: Linear  # outputs logits

    @property
    def matrix_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self.layers) + self.lm_head.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """What all layers of one forward step share."""

    attention: AttentionPlan
    rope: tuple[Tensor, Tensor]
    pool: KVPool
    slots: Tensor


class LlamaModel:
    """A loaded model, or one rank's part of it.

    Holds no state of any sequence: that is in the KV pool.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: LlamaWeights,
        inverse_frequencies: Tensor,
        ops: Ops,
        group: RankGroup | None = None,
    ) -> None:
        """`config` and `weights` have the heads and features of this rank of `group` alone."""
        self.config = config
        self.group = group or SingleRank()
        self._weights = weights
        self._inverse_frequencies = inverse_frequencies
        self.ops = ops

    @property
    def device(self) -> str:
        return str(self._weights.embedding.device)

    @property
    def weight_bytes(self) -> int:
        """Memory of the embedding and the matrices."""
        embedding, lm_head = self._weights.embedding, self._weights.lm_head
        memory = embedding.untyped_storage().data_ptr()
        shared = (
            isinstance(lm_head, DenseLinear)
            and lm_head.weight.untyped_storage().data_ptr() == memory
        )
        return self._weights.matrix_bytes + (0 if shared else embedding.nbytes)

    def forward(
        self, token_ids: Tensor, batch: AttentionBatch, pool: KVPool, logits_of: Tensor
    ) -> Tensor:
        """Run the tokens of a step, storing their KV, and return logits of some of them.

        token_ids: int64 [num_tokens]; logits_of: int64 [num_logits], indices into the tokens.
        Returns float32 [num_logits, vocab_size]; on other ranks than 0, some columns of it.
        Raises RankLost when another rank does not run the same step.
        """
        ops, config, weights = self.ops, self.config, self._weights
        step = _Step(
            attention=ops.plan_attention(
                batch, scale=config.head_dim**-0.5, window=config.sliding_window
            ),
            rope=cosine_and_sine(batch.positions, self._inverse_frequencies),
            pool=pool,
            slots=batch.slots,
        )
        residual = weights.embedding[token_ids]  # [num_tokens, hidden_size]
        first = weights.layers[0]
        x: Activation = ops.rms_norm(
            residual, first.input_norm, config.rms_norm_eps, quantize=first.qkv.takes_quantized
        )
        out, residual = self._layer(x, residual, 0, step)
        for index, layer in enumerate(weights.layers[1:], start=1):
            x, residual = self._add_norm(out, residual, layer.input_norm, layer.qkv)
            out, residual = self._layer(x, residual, index, step)
        if not len(logits_of):
            return out.new_empty(0, config.vocab_size, dtype=torch.float32)
        out, residual = out[logits_of], residual[logits_of]
        x, _ = self._add_norm(out, residual, weights.norm, weights.lm_head)
        return self.group.gather_columns(weights.lm_head(x).float(), config.vocab_size)

    def _layer(
        self, x: Activation, residual: Tensor, index: int, step: _Step
    ) -> tuple[Tensor, Tensor]:
        """(output of the feed-forward, residual before it is added), [num_tokens, hidden_size]."""
        layer = self._weights.layers[index]
        out = self._attend(x, index, layer, step)
        x, residual = self._add_norm(out, residual, layer.post_attention_norm, layer.feed_forward)
        return self.group.all_reduce(layer.feed_forward(x)), residual

    def _add_norm(
        self, out: Tensor, residual: Tensor, norm: Tensor, reader: Linear | FeedForward
    ) -> tuple[Activation, Tensor]:
        """Add a block's output to the residual and normalise the sum, as `reader` takes it."""
        return self.ops.add_rms_norm(
            out, residual, norm, self.config.rms_norm_eps, quantize=reader.takes_quantized
        )

    def _attend(self, x: Activation, index: int, layer: LayerWeights, step: _Step) -> Tensor:
        """Project to q, k and v, store k and v, attend, project back; [num_tokens, hidden]."""
        ops, config = self.ops, self.config
        qkv = layer.qkv(x)
        heads = qkv.view(len(qkv), -1, config.head_dim)
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = torch.split(heads, sizes, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = ops.rms_norm(k, layer.k_norm, config.rms_norm_eps)
        q = ops.rope_and_store(q, k, v, step.rope, step.pool, index, step.slots)
        attended = step.attention.run(q, step.pool, index).flatten(1)
        part = layer.output(ops.quantize(attended) if layer.output.takes_quantized else attended)
        return self.group.all_reduce(part)
