"""Causal attention of rows with any number of tokens over their paged contexts.

A program has a tile of query tokens with all query heads of one KV head, which therefore is read
once for all of them (FlashAttention-2; Dao, 2023). A token's result depends neither on the rows
beside it nor on how its prompt was cut into chunks: every tile has the same shape and goes through
the pages in order, and a page of which a token sees nothing adds 0. But which pages are masked
depends on where a tile begins, and a compiler may fuse other operations where no mask lies between
them: to the bit it holds for tiles that mask every page, `invariant` ones.
"""

import triton
import triton.language as tl
from torch import Tensor, empty_like

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

LAUNCH = LaunchConfig(num_warps=8, num_stages=3)
TILE_ROWS = 128  # query tokens times the query heads of one KV head
# Products in float32 take several times the registers: each is three of tensor cores.
WIDE_LAUNCH = LaunchConfig(num_warps=4)
WIDE_TILE_ROWS = 16


@triton.jit
def _find_row(
    cu_seqlens_ptr: tl.tensor, num_rows: tl.tensor, tile: tl.tensor, TOKENS: tl.constexpr
) -> tl.tensor:
    """The last row that has its first tile at `tile` or before.

    Row i starts at tile cu_seqlens[i] // TOKENS + i, which leaves every row enough of them.
    """
    low, high = tile * 0, num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["layer", "num_rows", "max_pages"])
def _prefill_kernel(
    q_ptr: tl.tensor,  # [num_tokens, num_heads, HEAD_DIM]
    kv: tl.tensor,  # what `kv_argument` makes
    scales_ptr: tl.tensor,  # float32, of a pool in 8 bits; else None
    page_table_ptr: tl.tensor,  # int32 [num_rows, max_pages]
    cu_seqlens_ptr: tl.tensor,  # int32 [num_rows + 1]
    context_lens_ptr: tl.tensor,  # int32 [num_rows]
    out_ptr: tl.tensor,  # [num_tokens, num_heads, HEAD_DIM]
    layer: tl.tensor,
    scale_log2: tl.tensor,
    num_rows: tl.tensor,
    max_pages: tl.tensor,
    NUM_LAYERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    ROWS: tl.constexpr,  # of a tile
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    TMA: tl.constexpr,
    INVARIANT: tl.constexpr,  # one loop, and so the same instructions, for all pages
) -> None:
    TOKENS: tl.constexpr = ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest contexts first
    kv_head = tl.program_id(1)
    row = _find_row(cu_seqlens_ptr, num_rows, tile, TOKENS)
    row_start = tl.load(cu_seqlens_ptr + row)
    num_tokens = tl.load(cu_seqlens_ptr + row + 1) - row_start
    first_token = (tile - row_start // TOKENS - row) * TOKENS  # of the row
    if first_token >= num_tokens:
        return
    context_len = tl.load(context_lens_ptr + row)
    first_position = context_len - num_tokens + first_token
    end_position = tl.minimum(first_position + TOKENS, context_len)

    lane = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_DIM)
    slot = tl.arange(0, PAGE)
    token = first_token + lane // GROUP
    position = first_position + lane // GROUP
    head = (row_start + token).to(tl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP
    at = (head + lane % GROUP)[:, None] * HEAD_DIM + dim[None, :]
    is_query = ((token < num_tokens) & (lane < TOKENS * GROUP))[:, None]
    q = tl.load(q_ptr + at, mask=is_query, other=0.0)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, HEAD_DIM], tl.float32)

    pages_ptr = page_table_ptr + row.to(tl.int64) * max_pages
    first = tl.maximum(first_position - WINDOW + 1, 0) // PAGE if WINDOW else tile * 0
    full = first  # pages before it are past for all
    if not INVARIANT:
        full = tl.maximum((first_position + 1) // PAGE, first)
    for index in tl.range(first, full):
        page = tl.load(pages_ptr + index)
        k, v, k_scales, v_scales = load_kv(
            kv, scales_ptr, page, layer, kv_head, NUM_LAYERS, NUM_KV_HEADS, PAGE, HEAD_DIM, TMA
        )
        visible = (index * PAGE + slot)[None, :] > (position - WINDOW)[:, None]
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
    for index in tl.range(full, tl.cdiv(end_position, PAGE)):
        page = tl.load(pages_ptr + index)
        k, v, k_scales, v_scales = load_kv(
            kv, scales_ptr, page, layer, kv_head, NUM_LAYERS, NUM_KV_HEADS, PAGE, HEAD_DIM, TMA
        )
        seen = index * PAGE + slot
        v, v_scales = hide_unwritten(
            v.to(q.dtype), v_scales, seen < context_len, scales_ptr is not None
        )
        visible = seen[None, :] <= position[:, None]
        if WINDOW:
            visible &= seen[None, :] > (position - WINDOW)[:, None]
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
            MASKED=True,
        )

    out = out / total[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=is_query)


def prefill_attention(
    q: Tensor,
    pool: KVPool,
    layer: int,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    invariant: bool = False,
    tma: bool = False,
    launch: LaunchConfig = LAUNCH,
) -> Tensor:
    """Attend with any number of tokens a row; see `AttentionPlan.run`.

    q: [num_tokens, num_heads, head_dim], contiguous. With `invariant` a token has the same bits in
    every batch and chunk, over pages of one size. `tma` fetches pages with the TMA unit of Hopper;
    `launch` is for 16 bits. Returns the shape of q. Raises KernelArgumentError.
    """
    sizes = attention_sizes(q, pool, layer, batch)
    wide = q.element_size() == 4
    tile_rows = max(WIDE_TILE_ROWS if wide else TILE_ROWS, triton.next_power_of_2(sizes.group))
    launch = WIDE_LAUNCH if wide else launch
    num_tiles = sizes.num_tokens // (tile_rows // sizes.group) + sizes.num_rows
    out = empty_like(q)
    _prefill_kernel[(num_tiles, sizes.num_kv_heads)](
        q,
        kv_argument(pool, tma=tma),
        pool.scales,
        batch.page_table,
        batch.cu_seqlens,
        batch.context_lens,
        out,
        layer,
        scale * LOG2_E,
        sizes.num_rows,
        batch.page_table.shape[1],
        NUM_LAYERS=sizes.num_layers,
        NUM_KV_HEADS=sizes.num_kv_heads,
        GROUP=sizes.group,
        ROWS=tile_rows,
        HEAD_DIM=sizes.head_dim,
        PAGE=sizes.page_size,
        WINDOW=window or 0,
        TMA=tma,
        INVARIANT=invariant,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out


def _prefill_variant(
    name: str,
    *,
    dtype: str = "bf16",
    head_dim: int = 128,
    page: int = 64,
    num_kv_heads: int = 8,
    group: int = 4,
    window: int = 0,
    tma: bool = True,
    quantized: str | None = None,
    invariant: bool = False,
) -> Variant:
    wide = dtype == "fp32"
    kv = quantized or dtype
    return Variant(
        name=f"prefill attention {dtype} {name}",
        kernel=_prefill_kernel,
        arguments={
            "q_ptr": f"*{dtype}:16",
            "kv": f"tensordesc<{kv}[1, {page}, {head_dim}]>" if tma else f"*{kv}:16",
            **({"scales_ptr": "*fp32:16"} if quantized else {}),
            "page_table_ptr": "*i32:16",
            "cu_seqlens_ptr": "*i32:16",
            "context_lens_ptr": "*i32:16",
            "out_ptr": f"*{dtype}:16",
            "layer": "i32",
            "scale_log2": "fp32",
            "num_rows": "i32",
            "max_pages": "i32",
        },
        constants={
            **({} if quantized else {"scales_ptr": None}),
            "NUM_LAYERS": 32,
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": group,
            "ROWS": WIDE_TILE_ROWS if wide else TILE_ROWS,
            "HEAD_DIM": head_dim,
            "PAGE": page,
            "WINDOW": window,
            "TMA": tma,
            "INVARIANT": invariant,
        },
        launch=WIDE_LAUNCH if wide else LAUNCH,
        min_capability=89 if quantized == "fp8e4nv" else 80,
        requires=("HMMA" if wide else "HGMMA", *(("UTMALDG",) if tma else ())),
    )


VARIANTS = (
    _prefill_variant("128 TMA"),
    _prefill_variant("128 TMA, pages of 128", page=128),
    _prefill_variant("128 TMA window", window=4096),
    _prefill_variant("128", tma=False),
    _prefill_variant("128 TMA, pool in int8", quantized="i8"),
    _prefill_variant("128, pool in int8", quantized="i8", tma=False),
    _prefill_variant("128 TMA, pool in fp8", quantized="fp8e4nv"),
    _prefill_variant("128, pool in fp8", quantized="fp8e4nv", tma=False),
    _prefill_variant("64 TMA, groups of 3", head_dim=64, num_kv_heads=3, group=3),
    _prefill_variant("128 TMA", dtype="fp32"),
    _prefill_variant("128 TMA, invariant", invariant=True),
    _prefill_variant("128 TMA, invariant", dtype="fp32", invariant=True),
    _prefill_variant("128 TMA, invariant, pool in int8", invariant=True, quantized="i8"),
)
