"""What both attention kernels do with one page: fetch K and V of a head, and attend to them.

A page is a tile: `[K|V][slot][head_dim]` of one (page, layer, KV head) is one run of memory, and on
Hopper one box of the TMA unit. Behind one in 8 bits lie its scales: that of a K weighs its scores,
that of a V its weights, so values are never restored. The softmax is the online one (Milakov and
Gimelshein, 2018; Dao et al., FlashAttention, 2022), with powers of two in place of those of e.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor, int32
from triton.tools.tensor_descriptor import TensorDescriptor

from pagewire.kernels.gpu.arguments import (
    require,
    require_contiguous,
    require_dtype,
    require_floats,
    require_same_device,
    require_shape,
)
from pagewire.kernels.kv_pool import KVPool
from pagewire.kernels.ops import AttentionBatch

LOG2_E = 1.4426950408889634
SCALE_BYTES: tl.constexpr = tl.constexpr(4)  # of a K or V of one token and head in 8 bits


@triton.jit
def load_kv(
    kv: tl.tensor,  # what `kv_argument` makes
    scales_ptr: tl.tensor,  # float32, of a pool in 8 bits; else None
    page: tl.tensor,
    layer: tl.tensor,
    kv_head: tl.tensor,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TMA: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """K and V of a head in one page, both [PAGE, HEAD_DIM], and their scales, [1, PAGE] or 1."""
    if TMA:
        segment = (page * NUM_LAYERS + layer) * NUM_KV_HEADS + kv_head
        k = kv.load([segment, 0, 0]).reshape(PAGE, HEAD_DIM)
        v = kv.load([segment, PAGE, 0]).reshape(PAGE, HEAD_DIM)
    else:
        segment = (page.to(tl.int64) * NUM_LAYERS + layer) * NUM_KV_HEADS + kv_head
        vector: tl.constexpr = HEAD_DIM if scales_ptr is None else HEAD_DIM + SCALE_BYTES
        inside = tl.arange(0, PAGE)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        k_ptr = kv + segment * (2 * PAGE * vector)
        k = tl.load(k_ptr + inside)
        v = tl.load(k_ptr + PAGE * HEAD_DIM + inside)
    k_scales, v_scales = 1.0, 1.0
    if scales_ptr is not None:
        stride: tl.constexpr = 2 * PAGE * (HEAD_DIM + SCALE_BYTES) // SCALE_BYTES
        scale_at = scales_ptr + segment.to(tl.int64) * stride + tl.arange(0, PAGE)[None, :]
        k_scales, v_scales = tl.load(scale_at), tl.load(scale_at + PAGE)
    return k, v, k_scales, v_scales


@triton.jit
def hide_unwritten(
    v: tl.tensor, v_scales: tl.tensor, written: tl.tensor, QUANTIZED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """V and its scales, with 0 in place of the NaN that slots may hold which nobody has written.

    v: float [PAGE, HEAD_DIM]; v_scales: [1, PAGE] with QUANTIZED; written: bool [PAGE].
    """
    if QUANTIZED:
        v_scales = tl.where(written[None, :], v_scales, 0.0)
    return tl.where(written[:, None], v, 0.0), v_scales


@triton.jit
def attend(
    q: tl.tensor,  # [ROWS, HEAD_DIM]
    k: tl.tensor,  # [PAGE, HEAD_DIM]
    v: tl.tensor,  # [PAGE, HEAD_DIM], finite also where nobody looks: 0 * NaN is NaN
    k_scales: tl.tensor,  # float32 [1, PAGE], or 1
    v_scales: tl.tensor,  # the same
    visible: tl.tensor,  # bool [ROWS, PAGE] or what broadcasts to it; read with MASKED only
    scale_log2: tl.tensor,  # scale * LOG2_E
    maximum: tl.tensor,  # float32 [ROWS], of the scores so far, in powers of 2
    total: tl.tensor,  # float32 [ROWS], of the weights so far, 2 ** (score - maximum)
    out: tl.tensor,  # float32 [ROWS, HEAD_DIM], V weighted so far
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(maximum, total, out) with one page more.

    float32 is multiplied as three products of its parts in TF32, which lose next to nothing.
    """
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="tf32x3")  # [ROWS, PAGE]
    scores = scores * (scale_log2 * k_scales)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen nothing yet keeps weights of 0: -inf minus -inf would be NaN.
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(maximum - base)
    total = total * decay + tl.sum(weights, 1)
    weights = (weights * v_scales).to(q.dtype)
    out = tl.dot(weights, v.to(q.dtype), out * decay[:, None], input_precision="tf32x3")
    return new_maximum, total, out


def kv_argument(pool: KVPool, *, tma: bool) -> Tensor | TensorDescriptor:
    """The pool as `load_kv` takes it: with `tma` a description for the TMA unit of Hopper.

    One description serves every layer, head and request.
    """
    if not tma:
        return pool.values
    *_, kinds, page_size, head_dim = pool.values.shape
    segments = pool.values.view(-1, kinds * page_size, head_dim)
    return TensorDescriptor.from_tensor(segments, [1, page_size, head_dim])


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSizes:
    """Of the arguments of one launch."""

    num_rows: int
    num_tokens: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads


def attention_sizes(q: Tensor, pool: KVPool, layer: int, batch: AttentionBatch) -> AttentionSizes:
    """Raises KernelArgumentError for what no attention kernel takes."""
    if pool.scales is None:
        require_floats(q=q, pool=pool.values)
    else:
        require_floats(q=q)
    require_shape("q", q, (None, None, None))
    num_tokens, num_heads, head_dim = q.shape
    _, num_layers, num_kv_heads, _, page_size, pool_head_dim = pool.values.shape
    require(
        num_heads % num_kv_heads == 0,
        f"{num_heads} heads share {num_kv_heads} KV heads; give a multiple",
    )
    require(
        head_dim == pool_head_dim and head_dim >= 16 and head_dim.bit_count() == 1,
        f"head_dim is {head_dim} and the pool's {pool_head_dim}; give the same power of two from "
        "16 on, or choose kernels torch",
    )
    require(0 <= layer < num_layers, f"layer is {layer}; the pool has {num_layers}")
    require(
        batch.page_size == page_size >= 16 and page_size.bit_count() == 1,
        f"page_size is {batch.page_size} and the pool's {page_size}; give the same power of two "
        "from 16 on",
    )
    num_rows = len(batch.context_lens)
    require_shape("cu_seqlens", batch.cu_seqlens, (num_rows + 1,))
    require_shape("page_table", batch.page_table, (num_rows, None))
    require(num_tokens >= num_rows, f"q has {num_tokens} tokens for {num_rows} rows; give each one")
    tables = {name: getattr(batch, name) for name in ("cu_seqlens", "context_lens", "page_table")}
    for name, table in tables.items():
        require_dtype(name, table, int32)
    require_contiguous(q=q, **tables)
    require_same_device(q=q, pool=pool.values, **tables)
    return AttentionSizes(
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
    )
