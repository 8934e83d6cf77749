"""The gate of a SwiGLU block: silu(gate) * up, in one pass over both.

silu(x) = x / (1 + exp(-x)) (Shazeer, "GLU Variants Improve Transformer", 2020), in float32.
"""

import triton
import triton.language as tl
from torch import Tensor, empty

from pagewire.kernels.gpu.arguments import require, require_dense, require_floats, require_shape
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

LAUNCH = LaunchConfig(num_warps=4)
BLOCK = 1024


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr: tl.tensor,  # [num_tokens, 2 * dim], gate first
    out_ptr: tl.tensor,  # [num_tokens, dim], contiguous
    dim: tl.tensor,
    stride: tl.tensor,  # from one token to the next in gate_up
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < dim
    gate_at = gate_up_ptr + token * stride + column
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + dim, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + token * dim + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    gate_up: [num_tokens, 2 * dim], gate first, the last dimension dense. Returns [num_tokens, dim].
    Raises KernelArgumentError.
    """
    require_floats(gate_up=gate_up)
    require_shape("gate_up", gate_up, (None, None))
    require_dense(gate_up=gate_up)
    num_tokens, both = gate_up.shape
    require(both % 2 == 0, f"gate_up has {both} columns; give as many for gate as for up")
    out = empty((num_tokens, both // 2), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(num_tokens, triton.cdiv(both // 2, BLOCK))](
        gate_up, out, both // 2, gate_up.stride(0), BLOCK=BLOCK, num_warps=LAUNCH.num_warps
    )
    return out


VARIANTS = (
    Variant(
        name="silu_mul bf16",
        kernel=_silu_mul_kernel,
        arguments={
            "gate_up_ptr": "*bf16:16",
            "out_ptr": "*bf16:16",
            "dim": "i32:16",
            "stride": "i32:16",
        },
        constants={"BLOCK": BLOCK},
        launch=LAUNCH,
    ),
)
