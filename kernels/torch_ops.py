"""Every operation in plain torch, on any device.

Attention runs a prompt chunk as one call a row and tokens of decode as one call for rows of similar
length; both copy the pages that they read into one run per head first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from pagewire.kernels import torch_sampling
from pagewire.kernels.kv_pool import KVPool, quantize_vectors
from pagewire.kernels.ops import (
    Activation,
    AttentionBatch,
    GroupedActivation,
    Logprobs,
    SamplingRows,
)
from pagewire.kernels.quantized import quantize as quantized
from pagewire.kernels.torch_sampling import TorchSamplingPlan

# Decode rows share a call while the longest has at most this many times the pages of the shortest.
MAX_PADDING = 1.25


class TorchOps:
    """Implements `pagewire.kernels.ops.Ops`."""

    @property
    def recorder(self) -> None:
        """Plain torch does not record."""

    def quantize(self, x: Tensor) -> GroupedActivation:
        return quantized(x)

    @overload
    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, quantize: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, quantize: bool) -> Activation: ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, quantize: bool = False
    ) -> Activation:
        normed = F.rms_norm(x, weight.shape, weight, eps)
        return self.quantize(normed) if quantize else normed

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, quantize: bool = False
    ) -> tuple[Activation, Tensor]:
        residual = residual.add_(x)
        return self.rms_norm(residual, weight, eps, quantize=quantize), residual

    def silu_mul(self, gate_up: Tensor, *, quantize: bool = False) -> Activation:
        gate, up = gate_up.chunk(2, dim=-1)
        product = F.silu(gate).mul_(up)
        return self.quantize(product) if quantize else product

    def rope_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor],
        pool: KVPool,
        layer: int,
        slots: Tensor,
    ) -> Tensor:
        pool.require(k.dtype)
        page_size = pool.values.shape[4]
        at = slots // page_size, slots % page_size
        # [num_pages, page_size, num_kv_heads, 2, head_dim]: advanced indices side by side.
        values = pool.values[:, layer].permute(0, 3, 1, 2, 4)
        if pool.scales is None:
            values[at] = torch.stack((_rotate(k, rope), v), dim=2)
        else:
            # In float32, so that a rotated k is rounded once.
            kv = torch.stack((_rotate(k.float(), rope), v.float()), dim=2)
            values[at], pool.scales[:, layer].permute(0, 3, 1, 2)[at] = quantize_vectors(
                kv, pool.values.dtype
            )
        return _rotate(q, rope)

    def plan_attention(
        self, batch: AttentionBatch, *, scale: float, window: int | None
    ) -> "TorchAttentionPlan":
        starts = batch.cu_seqlens.tolist()
        contexts = batch.context_lens.tolist()
        decode: list[_Row] = []
        chunks: list[_Chunk] = []
        for index, context_len in enumerate(contexts):
            row = _Row(
                start=starts[index],
                end=starts[index + 1],
                context_len=context_len,
                pages=batch.page_table[index, : -(-context_len // batch.page_size)],
            )
            if row.end - row.start == 1:
                decode.append(row)
            else:
                chunks.append(_Chunk(row=row, visible=_visible_to_chunk(row, window)))
        groups = tuple(_group(rows, batch.page_size, window) for rows in _similar_lengths(decode))
        return TorchAttentionPlan(chunks=tuple(chunks), groups=groups, scale=scale)

    def plan_sampling(self, rows: SamplingRows) -> TorchSamplingPlan:
        return TorchSamplingPlan(rows)

    def logprobs(self, logits: Tensor, rows: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
        return torch_sampling.logprobs(logits[rows], tokens, num_top)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One row of a step; its tokens are start .. end of the ragged dimension."""

    start: int
    end: int
    context_len: int
    pages: Tensor  # int32 [num_pages]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chunk:
    """A row with several tokens."""

    row: _Row
    visible: Tensor | None  # bool [num_tokens, context_len]; None: plainly causal


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _DecodeGroup:
    """Rows of one token each that run in one call."""

    tokens: Tensor  # int64 [num_rows], indices into the ragged dimension
    pages: Tensor  # int32 [num_rows * max_pages], shorter rows padded with page 0
    visible: Tensor  # bool [num_rows, max_pages * page_size]
    shared_len: int  # slots before this one are in the context of every row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TorchAttentionPlan:
    """Implements `pagewire.kernels.ops.AttentionPlan`."""

    chunks: tuple[_Chunk, ...]
    groups: tuple[_DecodeGroup, ...]
    scale: float

    def run(self, q: Tensor, pool: KVPool, layer: int) -> Tensor:
        out = torch.empty_like(q)
        for chunk in self.chunks:
            row = chunk.row
            out[row.start : row.end] = self._run_chunk(chunk, q[row.start : row.end], pool, layer)
        for group in self.groups:
            out[group.tokens] = self._run_group(group, q[group.tokens], pool, layer)
        return out

    def _run_chunk(self, chunk: _Chunk, q: Tensor, pool: KVPool, layer: int) -> Tensor:
        num_tokens, num_heads, head_dim = q.shape
        kv = _gather_pages(pool, layer, chunk.row.pages, q.dtype)[:, :, : chunk.row.context_len]
        num_kv_heads = kv.shape[1]
        # The query heads of one KV head become a dimension over which K and V have stride 0.
        q = q.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        k, v = kv[:, :, None].expand(-1, -1, num_heads // num_kv_heads, -1, -1)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=chunk.visible, is_causal=chunk.visible is None, scale=self.scale
        )  # [num_kv_heads, group, num_tokens, head_dim]
        return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)

    def _run_group(self, group: _DecodeGroup, q: Tensor, pool: KVPool, layer: int) -> Tensor:
        num_rows, num_heads, head_dim = q.shape
        kv = _gather_pages(pool, layer, group.pages, q.dtype)
        num_kv_heads = kv.shape[1]
        kv = kv.view(2, num_kv_heads, num_rows, -1, head_dim)
        # Slots outside a context hold anything, NaN too, and 0 * NaN would reach the sum.
        hidden = ~group.visible[:, group.shared_len :, None]
        kv[..., group.shared_len :, :].masked_fill_(hidden, 0)
        # The query heads of one KV head become the query positions of one matrix product.
        q = q.view(num_rows, num_kv_heads, -1, head_dim).transpose(0, 1)
        out = F.scaled_dot_product_attention(
            q, kv[0], kv[1], attn_mask=group.visible[None, :, None], scale=self.scale
        )  # [num_kv_heads, num_rows, group, head_dim]
        return out.transpose(0, 1).reshape(num_rows, num_heads, head_dim)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the two halves of each head against each other; x: [num_tokens, heads, head_dim]."""
    cosine, sine = rope[0][:, None], rope[1][:, None]
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, dim=-1).to(x.dtype)


def _gather_pages(pool: KVPool, layer: int, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy K and V of `pages` into one run a head: `dtype` [2, num_kv_heads, slots, head_dim]."""
    pool.require(dtype)
    values = _select_pages(pool.values[:, layer], pages)
    if pool.scales is None:
        return values
    scales = _select_pages(pool.scales[:, layer], pages)
    return values.float().mul_(scales[..., None]).to(dtype)


def _select_pages(of_layer: Tensor, pages: Tensor) -> Tensor:
    """[num_pages, num_kv_heads, 2, page_size, ...] to [2, num_kv_heads, slots, ...] of `pages`."""
    return of_layer.movedim(0, 2).transpose(0, 1).index_select(2, pages).flatten(2, 3)


def _visible_to_chunk(row: _Row, window: int | None) -> Tensor | None:
    """Which context positions each token of a chunk sees, bool [num_tokens, context_len]."""
    num_tokens = row.end - row.start
    if num_tokens == row.context_len and (window is None or window >= row.context_len):
        return None
    device = row.pages.device
    position = torch.arange(row.context_len - num_tokens, row.context_len, device=device)[:, None]
    return _visible(position, torch.arange(row.context_len, device=device), window)


def _visible(position: Tensor, context: Tensor, window: int | None) -> Tensor:
    visible = context <= position
    return visible if window is None else visible & (context > position - window)


def _similar_lengths(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Cut `rows` into groups whose page counts differ by at most MAX_PADDING."""
    group: list[_Row] = []
    for row in sorted(rows, key=lambda row: row.context_len):
        if group and len(row.pages) > MAX_PADDING * len(group[0].pages):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _group(rows: list[_Row], page_size: int, window: int | None) -> _DecodeGroup:
    """`rows` are sorted by length."""
    device = rows[0].pages.device
    pages = torch.nn.utils.rnn.pad_sequence([row.pages for row in rows], batch_first=True)
    context_lens = torch.tensor([row.context_len for row in rows], device=device)
    slots = torch.arange(pages.shape[1] * page_size, device=device)
    return _DecodeGroup(
        tokens=torch.tensor([row.start for row in rows], device=device),
        pages=pages.flatten(),
        visible=_visible(context_lens[:, None] - 1, slots, window),
        shared_len=rows[0].context_len,
    )
