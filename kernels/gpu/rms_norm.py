"""Root-mean-square norm of rows, optionally of their sum with a residual, which is kept.

y_i = w_i x_i / sqrt(mean(x²) + eps) (Zhang and Sennrich, 2019). One program a row, which is read
once; sums are in float32. The sum with the residual is rounded before it is normalised, so that the
norm is of what later layers see.
"""

import triton
import triton.language as tl
from torch import Tensor, empty

from pagewire.kernels.gpu.arguments import (
    require,
    require_contiguous,
    require_dense,
    require_floats,
    require_shape,
)
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=8)


@triton.jit
def _rms_norm_kernel(
    x_ptr: tl.tensor,  # [outer, inner, DIM], strided
    residual_ptr: tl.tensor,  # [outer, DIM], contiguous; read and written with ADD only
    weight_ptr: tl.tensor,  # [DIM]
    out_ptr: tl.tensor,  # [outer, inner, DIM], contiguous
    inner: tl.tensor,
    x_stride_outer: tl.tensor,
    x_stride_inner: tl.tensor,
    eps: tl.tensor,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    start = row // inner * x_stride_outer + row % inner * x_stride_inner
    x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual_at = residual_ptr + row * DIM + column
        x += tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
        total = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_at, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / DIM + eps) * weight
    tl.store(out_ptr + row * DIM + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension.

    x: [rows, dim] or [outer, inner, dim], of any strides but the last, which is 1; weight: [dim].
    Returns the shape of x. Raises KernelArgumentError.
    """
    require_floats(x=x, weight=weight)
    require_dense(x=x, weight=weight)
    require(x.dim() in (2, 3), f"x has {x.dim()} dimensions; give 2 or 3")
    require_shape("weight", weight, (x.shape[-1],))
    rows = x[:, None] if x.dim() == 2 else x
    out = empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, x, weight, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum overwrites `residual`.

    x, residual: [rows, dim], residual contiguous; weight: [dim]. Raises KernelArgumentError.
    """
    require_floats(x=x, residual=residual, weight=weight)
    require_dense(x=x, weight=weight)
    require_shape("x", x, (None, None))
    require_shape("residual", residual, tuple(x.shape))
    require_shape("weight", weight, (x.shape[1],))
    require_contiguous(residual=residual)
    out = empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x[:, None], residual, weight, out, eps, add=True)
    return out, residual


def _launch(
    rows: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, *, add: bool
) -> None:
    """rows: [outer, inner, dim]."""
    outer, inner, dim = rows.shape
    _rms_norm_kernel[(outer * inner,)](
        rows,
        residual,
        weight,
        out,
        inner,
        rows.stride(0),
        rows.stride(1),
        eps,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        ADD=add,
        num_warps=LAUNCH.num_warps,
    )


VARIANTS = tuple(
    Variant(
        name=f"{name} bf16 {dim}",
        kernel=_rms_norm_kernel,
        arguments={
            "x_ptr": "*bf16:16",
            "residual_ptr": "*bf16:16",
            "weight_ptr": "*bf16:16",
            "out_ptr": "*bf16:16",
            "inner": "i32",
            "x_stride_outer": "i32:16",
            "x_stride_inner": "i32:16",
            "eps": "fp32",
        },
        constants={"DIM": dim, "BLOCK": dim, "ADD": add},
        launch=LAUNCH,
    )
    for name, dim, add in (("rms_norm", 128, False), ("add_rms_norm", 4096, True))
)
