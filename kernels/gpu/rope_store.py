"""Rotary position embedding of q and k, and k and v written to their slots, in one pass.

The halves of a head are the two parts of complex numbers, turned by an angle that grows with the
position (Su et al., RoFormer, 2021; halves as in GPT-NeoX). One program a token; in float32, from
which a pool in 8 bits is filled as `kv_pool.quantize_vectors` does.
"""

import triton
import triton.language as tl
from torch import Tensor, bfloat16, empty, float8_e4m3fn, float32, int8, int64

from pagewire.kernels.gpu.activation_quant import narrow, scales_of
from pagewire.kernels.gpu.arguments import (
    require,
    require_contiguous,
    require_dtype,
    require_floats,
    require_same_device,
    require_shape,
)
from pagewire.kernels.gpu.attention_tile import SCALE_BYTES
from pagewire.kernels.gpu.variant import LaunchConfig, Variant
from pagewire.kernels.kv_pool import QUANTIZED, KVPool

LAUNCH = LaunchConfig(num_warps=4)


@triton.jit
def _rotate(
    source_ptr: tl.tensor,  # of a token
    target_ptr: tl.tensor,
    source: tl.tensor,  # [HEADS, HALF], where the first half of each head is
    target: tl.tensor,
    inside: tl.tensor,  # bool [HEADS, 1]
    cosine: tl.tensor,  # float32 [1, HALF]
    sine: tl.tensor,
    HALF: tl.constexpr,
) -> None:
    first = tl.load(source_ptr + source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source_ptr + source + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = target_ptr.dtype.element_ty
    turned = first * cosine - second * sine
    tl.store(target_ptr + target, turned.to(dtype), mask=inside)
    turned = second * cosine + first * sine
    tl.store(target_ptr + target + HALF, turned.to(dtype), mask=inside)


@triton.jit
def _store_quantized(
    x: tl.tensor,  # float32 [KV_BLOCK, HEAD_DIM], K or V of a token
    values_at: tl.tensor,  # pointers, of 8 bits [KV_BLOCK, HEAD_DIM]
    scales_at: tl.tensor,  # pointers, float32 [KV_BLOCK]
    inside: tl.tensor,  # bool [KV_BLOCK]
    LARGEST: tl.constexpr,
) -> None:
    scales = scales_of(x, 1, LARGEST)
    values = narrow(x, scales[:, None], values_at.dtype.element_ty)
    tl.store(values_at, values, mask=inside[:, None])
    tl.store(scales_at, scales, mask=inside)


@triton.jit
def _quantize_and_store(
    k_ptr: tl.tensor,  # of a token, [NUM_KV_HEADS, HEAD_DIM]
    v_ptr: tl.tensor,
    cosine_ptr: tl.tensor,  # of a token, float32 [HEAD_DIM / 2]
    sine_ptr: tl.tensor,
    pool_ptr: tl.tensor,  # of 8 bits, the first segment of a page and layer
    scales_ptr: tl.tensor,  # float32, the same
    slot: tl.tensor,  # of the page
    NUM_KV_HEADS: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Rotate K, and store it and V in 8 bits."""
    HALF: tl.constexpr = HEAD_DIM // 2
    SEGMENT: tl.constexpr = 2 * PAGE * (HEAD_DIM + SCALE_BYTES)
    kv_head, dim = tl.arange(0, KV_BLOCK), tl.arange(0, HEAD_DIM)[None, :]
    inside = kv_head < NUM_KV_HEADS
    at = kv_head[:, None] * HEAD_DIM
    x = tl.load(k_ptr + at + dim, mask=inside[:, None], other=0.0).to(tl.float32)
    partner = (dim + HALF) % HEAD_DIM  # in the other half
    y = tl.load(k_ptr + at + partner, mask=inside[:, None], other=0.0).to(tl.float32)
    cosine, sine = tl.load(cosine_ptr + dim % HALF), tl.load(sine_ptr + dim % HALF)
    k = tl.where(dim < HALF, x * cosine - y * sine, x * cosine + y * sine)
    v = tl.load(v_ptr + at + dim, mask=inside[:, None], other=0.0).to(tl.float32)
    values_at = pool_ptr + kv_head[:, None] * SEGMENT + slot * HEAD_DIM + dim
    scales_at = scales_ptr + kv_head * (SEGMENT // SCALE_BYTES) + slot
    _store_quantized(k, values_at, scales_at, inside, LARGEST)
    _store_quantized(v, values_at + PAGE * HEAD_DIM, scales_at + PAGE, inside, LARGEST)


@triton.jit(do_not_specialize=["layer"])
def _rope_store_kernel(
    q_ptr: tl.tensor,  # [num_tokens, NUM_HEADS, HEAD_DIM], tokens strided, as k and v
    k_ptr: tl.tensor,  # [num_tokens, NUM_KV_HEADS, HEAD_DIM]
    v_ptr: tl.tensor,
    cosine_ptr: tl.tensor,  # float32 [num_tokens, HEAD_DIM / 2]
    sine_ptr: tl.tensor,
    slots_ptr: tl.tensor,  # int64 [num_tokens], -1: stored nowhere
    out_ptr: tl.tensor,  # [num_tokens, NUM_HEADS, HEAD_DIM]
    pool_ptr: tl.tensor,  # [num_pages, NUM_LAYERS, NUM_KV_HEADS, 2, PAGE, HEAD_DIM]
    scales_ptr: tl.tensor,  # float32 [num_pages, .., 2, PAGE], of a pool in 8 bits; else None
    layer: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    NUM_LAYERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF)[None, :]
    cosine = tl.load(cosine_ptr + token * HALF + pair)
    sine = tl.load(sine_ptr + token * HALF + pair)

    head = tl.arange(0, HEAD_BLOCK)[:, None]
    at = head * HEAD_DIM + pair
    out = out_ptr + token * (NUM_HEADS * HEAD_DIM)
    _rotate(q_ptr + token * q_stride, out, at, at, head < NUM_HEADS, cosine, sine, HALF)

    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    kv_head = tl.arange(0, KV_BLOCK)[:, None]
    inside = kv_head < NUM_KV_HEADS
    page = slot // PAGE
    segment = (page * NUM_LAYERS + layer) * NUM_KV_HEADS
    if scales_ptr is not None:
        segment_bytes: tl.constexpr = 2 * PAGE * (HEAD_DIM + SCALE_BYTES)
        _quantize_and_store(
            k_ptr + token * k_stride,
            v_ptr + token * v_stride,
            cosine_ptr + token * HALF,
            sine_ptr + token * HALF,
            pool_ptr + segment * segment_bytes,
            scales_ptr + segment * (segment_bytes // SCALE_BYTES),
            slot % PAGE,
            NUM_KV_HEADS,
            KV_BLOCK,
            HEAD_DIM,
            PAGE,
            LARGEST,
        )
    else:
        stored = (segment + kv_head) * (2 * PAGE * HEAD_DIM) + slot % PAGE * HEAD_DIM
        at = kv_head * HEAD_DIM + pair
        _rotate(k_ptr + token * k_stride, pool_ptr, at, stored + pair, inside, cosine, sine, HALF)
        dim = tl.arange(0, HEAD_DIM)[None, :]
        v = tl.load(v_ptr + token * v_stride + kv_head * HEAD_DIM + dim, mask=inside, other=0.0)
        tl.store(pool_ptr + stored + PAGE * HEAD_DIM + dim, v, mask=inside)


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor],
    pool: KVPool,
    layer: int,
    slots: Tensor,
) -> Tensor:
    """As `Ops.rope_and_store`, with slots of -1 for tokens that are stored nowhere.

    The heads of a token lie behind one another. Raises KernelArgumentError.
    """
    num_tokens, num_heads, head_dim = q.shape
    _, num_layers, num_kv_heads, _, page_size, pool_head_dim = pool.values.shape
    if pool.scales is None:
        require_floats(q=q, k=k, v=v, pool=pool.values)
    else:
        require_floats(q=q, k=k, v=v)
    require(
        head_dim == pool_head_dim and head_dim >= 2 and head_dim.bit_count() == 1,
        f"head_dim is {head_dim} and the pool's {pool_head_dim}; give the same power of two, or "
        "choose kernels torch",
    )
    for name, heads in (("q", q), ("k", k), ("v", v)):
        require_shape(
            name, heads, (num_tokens, num_heads if name == "q" else num_kv_heads, head_dim)
        )
        require(
            heads.stride()[1:] == (head_dim, 1), f"the heads of {name} are strided; give a copy"
        )
    for name, part in zip(("cosine", "sine"), rope, strict=True):
        require_shape(name, part, (num_tokens, head_dim // 2))
        require_dtype(name, part, float32)
        require_contiguous(**{name: part})
    require_shape("slots", slots, (num_tokens,))
    require_dtype("slots", slots, int64)
    require_contiguous(slots=slots)
    require_same_device(q=q, pool=pool.values, cosine=rope[0], sine=rope[1], slots=slots)
    require(0 <= layer < num_layers, f"layer is {layer}; the pool has {num_layers}")
    out = empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    _rope_store_kernel[(num_tokens,)](
        q,
        k,
        v,
        *rope,
        slots,
        out,
        pool.values,
        pool.scales,
        layer,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        NUM_LAYERS=num_layers,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_BLOCK=triton.next_power_of_2(num_heads),
        KV_BLOCK=triton.next_power_of_2(num_kv_heads),
        HEAD_DIM=head_dim,
        PAGE=page_size,
        LARGEST=QUANTIZED.get(pool.values.dtype),
        num_warps=LAUNCH.num_warps,
    )
    return out


VARIANTS = tuple(
    Variant(
        name=f"rope_and_store bf16 {name}",
        kernel=_rope_store_kernel,
        arguments={
            "q_ptr": "*bf16:16",
            "k_ptr": "*bf16:16",
            "v_ptr": "*bf16:16",
            "cosine_ptr": "*fp32:16",
            "sine_ptr": "*fp32:16",
            "slots_ptr": "*i64:16",
            "out_ptr": "*bf16:16",
            "pool_ptr": f"*{written}:16",
            **({"scales_ptr": "*fp32:16"} if dtype in QUANTIZED else {}),
            "layer": "i32",
            "q_stride": "i32:16",
            "k_stride": "i32:16",
            "v_stride": "i32:16",
        },
        constants={
            **({} if dtype in QUANTIZED else {"scales_ptr": None}),
            "NUM_LAYERS": 32,
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_BLOCK": triton.next_power_of_2(num_heads),
            "KV_BLOCK": triton.next_power_of_2(num_kv_heads),
            "HEAD_DIM": head_dim,
            "PAGE": 64,
            "LARGEST": QUANTIZED.get(dtype),
        },
        launch=LAUNCH,
        min_capability=89 if dtype is float8_e4m3fn else 80,
    )
    for name, num_heads, num_kv_heads, head_dim, dtype, written in (
        ("128", 32, 8, 128, bfloat16, "bf16"),
        ("64", 9, 3, 64, bfloat16, "bf16"),
        ("128, pool in int8", 32, 8, 128, int8, "i8"),
        ("128, pool in fp8", 32, 8, 128, float8_e4m3fn, "fp8e4nv"),
    )
)
