"""The gate of a SwiGLU block with its result in 8 bits, as the matrix behind it takes it.

What `silu_mul` and then `activation_quant` would give, to the bit, without the trip through memory:
silu(gate) * up, rounded to its dtype, then one scale a token. A program does one token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.activation_quant import LARGEST, launch, narrow, scales_of
from pagewire.kernels.gpu.arguments import FLOATS, require, require_array
from pagewire.kernels.gpu.variant import Variant


@triton.jit
def _silu_mul_quant_kernel(
    gate_up_ptr: tl.tensor,  # [num_tokens, 2 * dim], gate first
    values_ptr: tl.tensor,  # int8 or float8 e4m3 [num_tokens, dim]
    scales_ptr: tl.tensor,  # float32 [num_tokens]
    dim: tl.tensor,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    gate_at = gate_up_ptr + token * 2 * dim + column
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + dim, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    y = y.to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    scale = scales_of(y, 0, LARGEST)
    tl.store(scales_ptr + token, scale)
    quantized = narrow(y, scale, values_ptr.dtype.element_ty)
    tl.store(values_ptr + token * dim + column, quantized, mask=inside)


def silu_mul_quant(gate_up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """silu(gate) * up in `dtype`, int8 or float8_e4m3fn, and the scale of each token.

    gate_up: floating [num_tokens, 2 * dim], gate first, contiguous. Returns values
    [num_tokens, dim] and scales, float32 [num_tokens]. Raises KernelArgumentError.
    """
    require_array("gate_up", gate_up, (None, None), *FLOATS)
    require(dtype in LARGEST, f"dtype is {dtype}; give one of {', '.join(map(str, LARGEST))}")
    num_tokens, both = gate_up.shape
    require(both % 2 == 0, f"gate_up has {both} columns; give as many for gate as for up")
    dim = both // 2
    values = torch.empty((num_tokens, dim), dtype=dtype, device=gate_up.device)
    scales = torch.empty(num_tokens, dtype=torch.float32, device=gate_up.device)
    block = triton.next_power_of_2(dim)
    _silu_mul_quant_kernel[(num_tokens,)](
        gate_up, values, scales, dim, LARGEST[dtype], block, num_warps=launch(block).num_warps
    )
    return values, scales


VARIANTS = tuple(
    Variant(
        name=f"silu_mul_quant {name} 14336",
        kernel=_silu_mul_quant_kernel,
        arguments={
            "gate_up_ptr": "*bf16:16",
            "values_ptr": f"*{name}:16",
            "scales_ptr": "*fp32:16",
            "dim": "i32:16",
        },
        constants={"LARGEST": LARGEST[dtype], "BLOCK": 16_384},
        launch=launch(16_384),
        min_capability=capability,
    )
    for dtype, name, capability in (
        (torch.int8, "i8", 80),
        (torch.float8_e4m3fn, "fp8e4nv", 89),
    )
)
