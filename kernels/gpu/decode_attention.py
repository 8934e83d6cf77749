"""Attention of rows with one token each over their paged contexts, as in decode.

A context is split among programs, so that few rows keep a GPU busy, and a second kernel combines
what they found (flash-decoding; Dao et al., 2023). Every program works for all query heads of one
KV head, which therefore is read once.
"""

import math

import triton
import triton.language as tl
from torch import Tensor, empty, empty_like, float32

from pagewire.kernels.gpu.arguments import require
from pagewire.kernels.gpu.attention_tile import (
    LOG2_E,
    attend,
    attention_sizes,
    hide_unwritten,
    kv_argument,
    load_kv,
)
from pagewire.kernels.gpu.variant import LaunchConfig, Variant
from pagewire.kernels.kv_pool import KVPool
from pagewire.kernels.ops import AttentionBatch

LAUNCH = LaunchConfig(num_warps=4, num_stages=3)
COMBINE_LAUNCH = LaunchConfig(num_warps=4)

MIN_GROUP = 16  # rows of the smallest matrix product
MAX_SPLITS = 32
BLOCKS_PER_SM = 3  # programs that share an SM without waiting for each other


def choose_num_splits(num_rows: int, num_kv_heads: int, max_pages: int, num_sms: int) -> int:
    """Into how many parts each context is cut: the power of two that fills the GPU best.

    max_pages: that a context can have. Nothing of it follows from the lengths of a batch: so a CUDA
    graph can replay it, and the steps of one number of rows all run the same compiled kernel.
    """
    wanted = BLOCKS_PER_SM * num_sms / (num_rows * num_kv_heads)
    nearest: int = 1 << max(0, round(math.log2(wanted)))
    most: int = triton.next_power_of_2(max_pages)
    return min(nearest, most, MAX_SPLITS)


@triton.jit
def _pages_of_split(
    context_len: tl.tensor, PAGE: tl.constexpr, WINDOW: tl.constexpr, NUM_SPLITS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(first page that is seen, the one behind the last, pages of each split but the last)."""
    first = tl.maximum(context_len - WINDOW, 0) // PAGE if WINDOW else context_len * 0
    end = tl.cdiv(context_len, PAGE)
    return first, end, tl.cdiv(end - first, NUM_SPLITS)


@triton.jit(do_not_specialize=["layer", "max_pages"])
def _decode_kernel(
    q_ptr: tl.tensor,  # [num_rows, num_heads, HEAD_DIM]
    kv: tl.tensor,  # what `kv_argument` makes
    scales_ptr: tl.tensor,  # float32, of a pool in 8 bits; else None
    page_table_ptr: tl.tensor,  # int32 [num_rows, max_pages]
    context_lens_ptr: tl.tensor,  # int32 [num_rows], at least 1
    out_ptr: tl.tensor,  # [num_rows, num_heads, HEAD_DIM]; written where NUM_SPLITS is 1
    partial_ptr: tl.tensor,  # float32 [num_rows, num_heads, NUM_SPLITS, HEAD_DIM]; written else
    lse_ptr: tl.tensor,  # float32 [num_rows, num_heads, NUM_SPLITS], in powers of 2; written else
    layer: tl.tensor,
    scale_log2: tl.tensor,
    max_pages: tl.tensor,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    NUM_SPLITS: tl.constexpr,
    TMA: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context_len = tl.load(context_lens_ptr + row)
    first, end, pages_per_split = _pages_of_split(context_len, PAGE, WINDOW, NUM_SPLITS)
    first += split * pages_per_split
    end = tl.minimum(first + pages_per_split, end)
    if first >= end:
        return

    member = tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, HEAD_DIM)
    slot = tl.arange(0, PAGE)
    head = (row * NUM_KV_HEADS + kv_head) * GROUP + member  # of all rows
    in_group = member < GROUP
    at = head[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + at, mask=in_group[:, None], other=0.0)
    maximum = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    out = tl.zeros([GROUP_BLOCK, HEAD_DIM], tl.float32)

    pages_ptr = page_table_ptr + row * max_pages
    full = tl.minimum(context_len // PAGE, end)
    for index in tl.range(first, full):
        page = tl.load(pages_ptr + index)
        k, v, k_scales, v_scales = load_kv(
            kv, scales_ptr, page, layer, kv_head, NUM_LAYERS, NUM_KV_HEADS, PAGE, HEAD_DIM, TMA
        )
        visible = (index * PAGE + slot >= context_len - WINDOW)[None, :]
        maximum, total, out = attend(
            q,
            k,
            v,
            k_scales,
            v_scales,
            visible,
            scale_log2,
            maximum,
            total,
            out,
            MASKED=WINDOW > 0,
        )
    if full < end:  # the last page of the context: what lies behind it may be NaN
        page = tl.load(pages_ptr + full)
        k, v, k_scales, v_scales = load_kv(
            kv, scales_ptr, page, layer, kv_head, NUM_LAYERS, NUM_KV_HEADS, PAGE, HEAD_DIM, TMA
        )
        position = full * PAGE + slot
        visible = position < context_len
        v, v_scales = hide_unwritten(v.to(q.dtype), v_scales, visible, scales_ptr is not None)
        if WINDOW:
            visible &= position >= context_len - WINDOW
        maximum, total, out = attend(
            q,
            k,
            v,
            k_scales,
            v_scales,
            visible[None, :],
            scale_log2,
            maximum,
            total,
            out,
            MASKED=True,
        )

    out = out / total[:, None]
    if NUM_SPLITS == 1:
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=in_group[:, None])
    else:
        part = head * NUM_SPLITS + split
        partial_at = part[:, None] * HEAD_DIM + dim[None, :]
        tl.store(partial_ptr + partial_at, out, mask=in_group[:, None])
        tl.store(lse_ptr + part, maximum + tl.log2(total), mask=in_group)


@triton.jit
def _combine_kernel(
    partial_ptr: tl.tensor,  # as in _decode_kernel, what is not of an empty split
    lse_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = row * NUM_HEADS + tl.program_id(1)
    split = tl.arange(0, NUM_SPLITS)
    dim = tl.arange(0, HEAD_DIM)
    context_len = tl.load(context_lens_ptr + row)
    first, end, pages_per_split = _pages_of_split(context_len, PAGE, WINDOW, NUM_SPLITS)
    used = first + split * pages_per_split < end
    part = head * NUM_SPLITS + split
    lse = tl.load(lse_ptr + part, mask=used, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    partial_at = part[:, None] * HEAD_DIM + dim[None, :]
    partial = tl.load(partial_ptr + partial_at, mask=used[:, None], other=0.0)
    out = tl.sum(partial * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + head * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty))


def decode_attention(
    q: Tensor,
    pool: KVPool,
    layer: int,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    num_splits: int,
    tma: bool = False,
    launch: LaunchConfig = LAUNCH,
) -> Tensor:
    """Attend with one token a row; see `AttentionPlan.run`.

    q: [num_rows, num_heads, head_dim], contiguous. `num_splits` is a power of two; `tma` fetches
    pages with the TMA unit of Hopper. Returns the shape of q. Raises KernelArgumentError.
    """
    sizes = attention_sizes(q, pool, layer, batch)
    require(
        sizes.num_tokens == sizes.num_rows,
        f"q has {sizes.num_tokens} tokens for {sizes.num_rows} rows; give one for each",
    )
    require(num_splits.bit_count() == 1, f"num_splits is {num_splits}; give a power of two")
    out = empty_like(q)
    parts = (sizes.num_rows, sizes.num_heads, num_splits) if num_splits > 1 else (0,)
    lse = empty(parts, dtype=float32, device=q.device)
    partial = empty((*parts, sizes.head_dim), dtype=float32, device=q.device)
    _decode_kernel[(sizes.num_rows, sizes.num_kv_heads, num_splits)](
        q,
        kv_argument(pool, tma=tma),
        pool.scales,
        batch.page_table,
        batch.context_lens,
        out,
        partial,
        lse,
        layer,
        scale * LOG2_E,
        batch.page_table.shape[1],
        NUM_LAYERS=sizes.num_layers,
        NUM_KV_HEADS=sizes.num_kv_heads,
        GROUP=sizes.group,
        GROUP_BLOCK=max(MIN_GROUP, triton.next_power_of_2(sizes.group)),
        HEAD_DIM=sizes.head_dim,
        PAGE=sizes.page_size,
        WINDOW=window or 0,
        NUM_SPLITS=num_splits,
        TMA=tma,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if num_splits > 1:
        _combine_kernel[(sizes.num_rows, sizes.num_heads)](
            partial,
            lse,
            batch.context_lens,
            out,
            NUM_HEADS=sizes.num_heads,
            HEAD_DIM=sizes.head_dim,
            PAGE=sizes.page_size,
            WINDOW=window or 0,
            NUM_SPLITS=num_splits,
            num_warps=COMBINE_LAUNCH.num_warps,
        )
    return out


def _decode_variant(
    name: str,
    *,
    head_dim: int = 128,
    num_kv_heads: int = 8,
    group: int = 4,
    window: int = 0,
    num_splits: int = 8,
    tma: bool = True,
    quantized: str | None = None,
) -> Variant:
    page = 64
    kv = quantized or "bf16"
    return Variant(
        name=f"decode attention bf16 {name}",
        kernel=_decode_kernel,
        arguments={
            "q_ptr": "*bf16:16",
            "kv": f"tensordesc<{kv}[1, {page}, {head_dim}]>" if tma else f"*{kv}:16",
            **({"scales_ptr": "*fp32:16"} if quantized else {}),
            "page_table_ptr": "*i32:16",
            "context_lens_ptr": "*i32:16",
            "out_ptr": "*bf16:16",
            "partial_ptr": "*fp32:16",
            "lse_ptr": "*fp32:16",
            "layer": "i32",
            "scale_log2": "fp32",
            "max_pages": "i32",
        },
        constants={
            **({} if quantized else {"scales_ptr": None}),
            "NUM_LAYERS": 32,
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": group,
            "GROUP_BLOCK": MIN_GROUP,
            "HEAD_DIM": head_dim,
            "PAGE": page,
            "WINDOW": window,
            "NUM_SPLITS": num_splits,
            "TMA": tma,
        },
        launch=LAUNCH,
        min_capability=89 if quantized == "fp8e4nv" else 80,
        requires=("HMMA", "UTMALDG") if tma else ("HMMA",),
    )


VARIANTS = (
    _decode_variant("128 TMA"),
    _decode_variant("128 TMA unsplit", num_splits=1),
    _decode_variant("128 TMA window", window=4096),
    _decode_variant("128", tma=False),
    _decode_variant("128 TMA, pool in int8", quantized="i8"),
    _decode_variant("128, pool in int8", quantized="i8", tma=False),
    _decode_variant("128 TMA, pool in fp8", quantized="fp8e4nv"),
    _decode_variant("128, pool in fp8", quantized="fp8e4nv", tma=False),
    _decode_variant("64 TMA, groups of 3", head_dim=64, num_kv_heads=3, group=3),
    Variant(
        name="decode attention bf16 combine",
        kernel=_combine_kernel,
        arguments={
            "partial_ptr": "*fp32:16",
            "lse_ptr": "*fp32:16",
            "context_lens_ptr": "*i32:16",
            "out_ptr": "*bf16:16",
        },
        constants={
            "NUM_HEADS": 32,
            "HEAD_DIM": 128,
            "PAGE": 64,
            "WINDOW": 0,
            "NUM_SPLITS": MAX_SPLITS,
        },
        launch=COMBINE_LAUNCH,
    ),
)
