"""Copies the KV of a sequence from pages of one size into pages of another, or into other KV heads.

What a prefill worker sends comes so into the pages of a decode worker that has another page size or
another degree of tensor parallelism. Bytes are moved as they are; both pools have the same dtype.
"""

import triton
import triton.language as tl
from torch import Tensor, int32

from pagewire.kernels.gpu.arguments import (
    KernelArgumentError,
    require,
    require_contiguous,
    require_dtype,
    require_same_device,
    require_shape,
)
from pagewire.kernels.gpu.variant import LaunchConfig, Variant
from pagewire.kernels.kv_pool import KVPool

LAUNCH = LaunchConfig(num_warps=4)
WORD_BYTES = 4  # a scale


@triton.jit
def _copy_run(
    source_ptr: tl.tensor,
    target_ptr: tl.tensor,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    word = tl.arange(0, BLOCK)
    inside = word < WORDS
    tl.store(target_ptr + word, tl.load(source_ptr + word, mask=inside), mask=inside)


@triton.jit(
    do_not_specialize=["num_pages", "first_token", "num_heads", "first_layer", "first_head"]
)
def _retile_kernel(
    source_ptr: tl.tensor,  # int32 [pages, num_layers, num_heads, 2 (K, V), SOURCE_PAGE, WORDS]
    source_scales_ptr: tl.tensor,  # int32 [pages, num_layers, num_heads, 2, SOURCE_PAGE]; of SCALED
    target_ptr: tl.tensor,  # as the source, with TARGET_PAGE
    target_scales_ptr: tl.tensor,
    page_table_ptr: tl.tensor,  # int32 [num_pages]
    num_pages: tl.tensor,
    first_token: tl.tensor,
    num_heads: tl.tensor,
    source_page_stride: tl.tensor,  # all strides in words, the same for values and scales
    source_layer_stride: tl.tensor,
    source_head_stride: tl.tensor,
    target_page_stride: tl.tensor,
    target_layer_stride: tl.tensor,
    target_head_stride: tl.tensor,
    first_layer: tl.tensor,
    first_head: tl.tensor,
    SOURCE_PAGE: tl.constexpr,
    TARGET_PAGE: tl.constexpr,
    WORDS: tl.constexpr,  # of a K or V
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    SLOTS: tl.constexpr = min(SOURCE_PAGE, TARGET_PAGE)
    slot = tl.program_id(0) * SLOTS  # of the source
    layer = (tl.program_id(1) // num_heads).to(tl.int64)
    head = tl.program_id(1) % num_heads
    kind = tl.program_id(2)  # K or V
    token = first_token + slot
    if token // TARGET_PAGE >= num_pages:
        return
    page = tl.load(page_table_ptr + token // TARGET_PAGE).to(tl.int64)
    source = (
        (slot // SOURCE_PAGE).to(tl.int64) * source_page_stride
        + layer * source_layer_stride
        + head * source_head_stride
    )
    target = (
        page * target_page_stride
        + (first_layer + layer) * target_layer_stride
        + (first_head + head) * target_head_stride
    )
    source_slot = kind * SOURCE_PAGE + slot % SOURCE_PAGE
    target_slot = kind * TARGET_PAGE + token % TARGET_PAGE
    _copy_run(
        source_ptr + source + source_slot * WORDS,
        target_ptr + target + target_slot * WORDS,
        SLOTS * WORDS,
        BLOCK,
    )
    if SCALED:
        _copy_run(
            source_scales_ptr + source + source_slot,
            target_scales_ptr + target + target_slot,
            SLOTS,
            SLOTS,
        )


def retile_pages(
    source: KVPool,
    target: KVPool,
    page_table: Tensor,
    *,
    first_token: int,
    first_layer: int,
    first_head: int,
) -> None:
    """Copy all pages of `source`, which follow one another in a sequence, into pages of `target`.

    `source` has the layers and KV heads that are copied, to those from `first_layer` and
    `first_head` on; its first slot is `first_token` of the sequence, a multiple of its page size.
    page_table: int32 [num_pages], the target's pages of the sequence, from its first token on;
    slots that they do not reach are left out. Raises KernelArgumentError.
    """
    num_source_pages, num_layers, num_heads, _, source_page, head_dim = source.values.shape
    _, target_layers, target_heads, _, target_page, target_head_dim = target.values.shape
    if (source.values.dtype, head_dim) != (target.values.dtype, target_head_dim):
        raise KernelArgumentError(
            f"the source is {source.values.dtype} with head_dim {head_dim}, the target "
            f"{target.values.dtype} with {target_head_dim}; give the same"
        )
    vector_bytes = head_dim * source.values.element_size()
    require(
        vector_bytes % WORD_BYTES == 0,
        f"a K takes {vector_bytes} bytes; give a multiple of {WORD_BYTES}",
    )
    for name, size in (("source", source_page), ("target", target_page)):
        require(size.bit_count() == 1, f"pages of the {name} have {size} slots; give a power of 2")
    require(
        first_token >= 0 and first_token % source_page == 0,
        f"first_token is {first_token}; give a multiple of the source's page size, {source_page}",
    )
    require(
        0 <= first_layer <= target_layers - num_layers,
        f"layers {first_layer} to {first_layer + num_layers} of {target_layers}; give fewer",
    )
    require(
        0 <= first_head <= target_heads - num_heads,
        f"KV heads {first_head} to {first_head + num_heads} of {target_heads}; give fewer",
    )
    require_shape("page_table", page_table, (None,))
    require_dtype("page_table", page_table, int32)
    require_contiguous(page_table=page_table)
    require_same_device(source=source.values, target=target.values, page_table=page_table)
    values, target_values = source.values.view(int32), target.values.view(int32)
    slots = min(source_page, target_page)
    words = vector_bytes // WORD_BYTES
    _retile_kernel[(num_source_pages * source_page // slots, num_layers * num_heads, 2)](
        values,
        _scales(source),
        target_values,
        _scales(target),
        page_table,
        len(page_table),
        first_token,
        num_heads,
        *values.stride()[:3],
        *target_values.stride()[:3],
        first_layer,
        first_head,
        SOURCE_PAGE=source_page,
        TARGET_PAGE=target_page,
        WORDS=words,
        BLOCK=triton.next_power_of_2(slots * words),
        SCALED=source.scales is not None,
        num_warps=LAUNCH.num_warps,
    )


def _scales(pool: KVPool) -> Tensor:
    """int32; anything of that dtype where there are none."""
    return (pool.values if pool.scales is None else pool.scales).view(int32)


VARIANTS = tuple(
    Variant(
        name=f"retile_pages {name}",
        kernel=_retile_kernel,
        arguments={
            "source_ptr": "*i32:16",
            "source_scales_ptr": "*i32:16",
            "target_ptr": "*i32:16",
            "target_scales_ptr": "*i32:16",
            "page_table_ptr": "*i32:16",
            "num_pages": "i32",
            "first_token": "i32",
            "num_heads": "i32",
            "source_page_stride": "i32:16",
            "source_layer_stride": "i32:16",
            "source_head_stride": "i32:16",
            "target_page_stride": "i32:16",
            "target_layer_stride": "i32:16",
            "target_head_stride": "i32:16",
            "first_layer": "i32",
            "first_head": "i32",
        },
        constants={
            "SOURCE_PAGE": 64,
            "TARGET_PAGE": 16,
            "WORDS": words,
            "BLOCK": 16 * words,
            "SCALED": scaled,
        },
        launch=LAUNCH,
    )
    for name, words, scaled in (("bf16", 64, False), ("int8", 32, True))
)
