"""Activations to 8 bits with one scale per token: what a matrix in 8 bits multiplies.

values = round(x / scale), scale = max |x| / largest of the dtype, over the features of each token
(per-token dynamic quantisation; Dettmers et al., 2022). A program quantises one token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import FLOATS, require, require_array
from pagewire.kernels.gpu.variant import LaunchConfig, Variant
from pagewire.kernels.kv_pool import QUANTIZED

LARGEST = QUANTIZED

# Added and taken away again, it leaves a float32 below 2^22 rounded to an integer, halves to even.
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23


@triton.jit
def narrow(x: tl.tensor, scale: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """x / scale in 8 bits, to nearest even; x: float32, none of it larger than the dtype holds."""
    scaled = tl.div_rn(x, scale)
    if tl.int8 == DTYPE:
        scaled = tl.where(scaled == scaled, scaled, 0.0)  # an integer holds no NaN; the scale does
        scaled = (scaled + _ROUNDER) - _ROUNDER
    return scaled.to(DTYPE)


@triton.jit
def scales_of(x: tl.tensor, AXIS: tl.constexpr, LARGEST: tl.constexpr) -> tl.tensor:
    """max |x| / LARGEST along an axis, 1 where that is 0, NaN where any x is; x: float32."""
    scales = tl.div_rn(tl.max(tl.abs(x), axis=AXIS), LARGEST)
    scales = tl.where(scales > 0, scales, 1.0)  # all are 0, or so small that the quotient is
    has_nan = tl.max((x != x).to(tl.int32), axis=AXIS)  # tl.max passes NaN over
    return tl.where(has_nan > 0, float("nan"), scales)


@triton.jit
def _quantize_tokens_kernel(
    x_ptr: tl.tensor,  # [num_tokens, num_features]
    values_ptr: tl.tensor,  # int8 or float8 e4m3 [num_tokens, num_features]
    scales_ptr: tl.tensor,  # float32 [num_tokens]
    num_features: tl.tensor,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    mask = feature < num_features
    row = tl.load(x_ptr + token * num_features + feature, mask=mask, other=0.0).to(tl.float32)
    scale = scales_of(row, 0, LARGEST)
    tl.store(scales_ptr + token, scale)
    quantized = narrow(row, scale, values_ptr.dtype.element_ty)
    tl.store(values_ptr + token * num_features + feature, quantized, mask=mask)


def quantize_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in `dtype`, int8 or float8_e4m3fn, and the scale of each token: x ≈ values * scale.

    x: floating [num_tokens, num_features], contiguous. Returns [num_tokens, num_features] and
    float32 [num_tokens]. A scale is 1 where all features are 0. NaN reaches the scale. Raises
    KernelArgumentError for tensors or a dtype that are not so.
    """
    require_array("x", x, (None, None), *FLOATS)
    require(dtype in LARGEST, f"dtype is {dtype}; give one of {', '.join(map(str, LARGEST))}")
    num_tokens, num_features = x.shape
    values = torch.empty_like(x, dtype=dtype)
    scales = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(num_features)
    _quantize_tokens_kernel[(num_tokens,)](
        x, values, scales, num_features, LARGEST[dtype], block, num_warps=launch(block).num_warps
    )
    return values, scales


def launch(block: int) -> LaunchConfig:
    """Of a program that holds a row of `block` numbers in its registers."""
    return LaunchConfig(num_warps=min(16, max(4, block // 1024)))


VARIANTS = tuple(
    Variant(
        name=f"quantize_tokens {name} {features}",
        kernel=_quantize_tokens_kernel,
        arguments={
            "x_ptr": "*bf16:16",
            "values_ptr": f"*{name}:16",
            "scales_ptr": "*fp32:16",
            "num_features": "i32:16",
        },
        constants={"LARGEST": LARGEST[dtype], "BLOCK": triton.next_power_of_2(features)},
        launch=launch(triton.next_power_of_2(features)),
        min_capability=capability,
    )
    for dtype, name, capability in (
        (torch.int8, "i8", 80),
        (torch.float8_e4m3fn, "fp8e4nv", 89),
    )
    for features in (4096, 14_336)
)
