"""Pages of a KV cache from floats to 8 bits, as they are when pages of unlike workers meet.

values = round(x / scale), scale = max |x| / the largest number, over each K and each V of a token
and head: what `kv_pool.quantize_vectors` gives, to the bit. A program does K or V of one (page,
layer, KV head).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.activation_quant import narrow, scales_of
from pagewire.kernels.gpu.arguments import FLOATS, require, require_array, require_same_device
from pagewire.kernels.gpu.variant import LaunchConfig, Variant
from pagewire.kernels.kv_pool import QUANTIZED, KVPool

LAUNCH = LaunchConfig(num_warps=4)


@triton.jit
def _requantize_pages_kernel(
    source_ptr: tl.tensor,  # [num_pages, SEGMENTS, 2, PAGE, HEAD_DIM]
    source_pages_ptr: tl.tensor,  # int32 [num_copied]
    target_pages_ptr: tl.tensor,  # int32 [num_copied]
    values_ptr: tl.tensor,  # of 8 bits [num_pages, SEGMENTS, 2, PAGE, HEAD_DIM], strided
    scales_ptr: tl.tensor,  # float32 [num_pages, SEGMENTS, 2, PAGE], strided
    LARGEST: tl.constexpr,
    SEGMENTS: tl.constexpr,  # layers times KV heads, of a page
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SEGMENT_BYTES: tl.constexpr,  # of values and scales
) -> None:
    copied, segment, kind = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    source = tl.load(source_pages_ptr + copied).to(tl.int64) * SEGMENTS + segment
    target = tl.load(target_pages_ptr + copied).to(tl.int64) * SEGMENTS + segment
    slot = tl.arange(0, PAGE)
    inside = slot[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    half = kind * PAGE * HEAD_DIM  # V lies behind K
    x = tl.load(source_ptr + source * 2 * PAGE * HEAD_DIM + half + inside).to(tl.float32)
    scales = scales_of(x, 1, LARGEST)  # [PAGE]
    values = narrow(x, scales[:, None], values_ptr.dtype.element_ty)
    tl.store(values_ptr + target * SEGMENT_BYTES + half + inside, values)
    tl.store(scales_ptr + target * (SEGMENT_BYTES // 4) + kind * PAGE + slot, scales)


def requantize_pages(
    source: KVPool, target: KVPool, source_pages: Tensor, target_pages: Tensor
) -> None:
    """Write some pages of a pool in floats into pages of a pool in 8 bits.

    The pools differ in their dtype and in the number of their pages only. source_pages,
    target_pages: int32 [num_copied], no two targets the same. Slots that hold nothing yet may hold
    anything. Raises KernelArgumentError.
    """
    require(source.scales is None, "the source is in 8 bits already; give a pool in floats")
    require_array("source", source.values, (None,) * 6, *FLOATS)
    require(target.scales is not None, "the target is a pool in floats; give one in 8 bits")
    assert target.scales is not None
    require(
        source.values.shape[1:] == target.values.shape[1:],
        f"pages of the source are {list(source.values.shape[1:])}, of the target "
        f"{list(target.values.shape[1:])}; re-tile them first",
    )
    _, num_layers, num_kv_heads, _, page_size, head_dim = source.values.shape
    require(
        page_size.bit_count() == 1 and head_dim.bit_count() == 1,
        f"pages have {page_size} slots and head_dim is {head_dim}; give powers of two",
    )
    require_array("source_pages", source_pages, (None,), torch.int32)
    require_array("target_pages", target_pages, tuple(source_pages.shape), torch.int32)
    require_same_device(
        source=source.values,
        target=target.values,
        source_pages=source_pages,
        target_pages=target_pages,
    )
    _requantize_pages_kernel[(len(source_pages), num_layers * num_kv_heads, 2)](
        source.values,
        source_pages,
        target_pages,
        target.values,
        target.scales,
        QUANTIZED[target.values.dtype],
        num_layers * num_kv_heads,
        page_size,
        head_dim,
        target.segment_bytes,
        num_warps=LAUNCH.num_warps,
    )


VARIANTS = tuple(
    Variant(
        name=f"requantize_pages bf16 {name} 128",
        kernel=_requantize_pages_kernel,
        arguments={
            "source_ptr": "*bf16:16",
            "source_pages_ptr": "*i32:16",
            "target_pages_ptr": "*i32:16",
            "values_ptr": f"*{name}:16",
            "scales_ptr": "*fp32:16",
        },
        constants={
            "LARGEST": QUANTIZED[dtype],
            "SEGMENTS": 256,
            "PAGE": 64,
            "HEAD_DIM": 128,
            "SEGMENT_BYTES": 2 * 64 * (128 + 4),
        },
        launch=LAUNCH,
        min_capability=capability,
    )
    for dtype, name, capability in (
        (torch.int8, "i8", 80),
        (torch.float8_e4m3fn, "fp8e4nv", 89),
    )
)
