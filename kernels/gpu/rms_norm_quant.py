"""Root-mean-square norm with its result in 8 bits, as the matrix behind it takes it.

What `rms_norm` and then `activation_quant` would give, to the bit, without the trip through memory:
y_i = w_i x_i / sqrt(mean(x²) + eps), rounded to the dtype of x, then one scale a token. A program
does one token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.activation_quant import LARGEST, launch, narrow, scales_of
from pagewire.kernels.gpu.arguments import FLOATS, require, require_array
from pagewire.kernels.gpu.variant import Variant


@triton.jit
def _rms_norm_quant_kernel(
    x_ptr: tl.tensor,  # [num_tokens, DIM]
    residual_ptr: tl.tensor,  # [num_tokens, DIM]; read and written with ADD only
    weight_ptr: tl.tensor,  # [DIM]
    values_ptr: tl.tensor,  # int8 or float8 e4m3 [num_tokens, DIM]
    scales_ptr: tl.tensor,  # float32 [num_tokens]
    eps: tl.tensor,
    LARGEST: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    at = token * DIM + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + at, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / DIM + eps) * weight
    y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    scale = scales_of(y, 0, LARGEST)
    tl.store(scales_ptr + token, scale)
    tl.store(values_ptr + at, narrow(y, scale, values_ptr.dtype.element_ty), mask=inside)


def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The norm of each token in `dtype`, int8 or float8_e4m3fn, and its scale.

    x: [num_tokens, dim], weight: [dim], contiguous, of one floating dtype. Returns values
    [num_tokens, dim] and scales, float32 [num_tokens]. Raises KernelArgumentError.
    """
    return _run(x, x, weight, eps, dtype, add=False)


def add_rms_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `rms_norm_quant` of x + residual, which overwrites `residual`, [num_tokens, dim]."""
    require_array("residual", residual, tuple(x.shape), x.dtype, device=x.device)
    return _run(x, residual, weight, eps, dtype, add=True)


def _run(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, *, add: bool
) -> tuple[Tensor, Tensor]:
    require_array("x", x, (None, None), *FLOATS)
    require(dtype in LARGEST, f"dtype is {dtype}; give one of {', '.join(map(str, LARGEST))}")
    num_tokens, dim = x.shape
    require_array("weight", weight, (dim,), x.dtype, device=x.device)
    values = torch.empty_like(x, dtype=dtype)
    scales = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(dim)
    _rms_norm_quant_kernel[(num_tokens,)](
        x,
        residual,
        weight,
        values,
        scales,
        eps,
        LARGEST[dtype],
        dim,
        block,
        add,
        num_warps=launch(block).num_warps,
    )
    return values, scales


VARIANTS = tuple(
    Variant(
        name=f"add_rms_norm_quant {name} 4096",
        kernel=_rms_norm_quant_kernel,
        arguments={
            "x_ptr": "*bf16:16",
            "residual_ptr": "*bf16:16",
            "weight_ptr": "*bf16:16",
            "values_ptr": f"*{name}:16",
            "scales_ptr": "*fp32:16",
            "eps": "fp32",
        },
        constants={"LARGEST": LARGEST[dtype], "DIM": 4096, "BLOCK": 4096, "ADD": True},
        launch=launch(4096),
        min_capability=capability,
    )
    for dtype, name, capability in (
        (torch.int8, "i8", 80),
        (torch.float8_e4m3fn, "fp8e4nv", 89),
    )
)
