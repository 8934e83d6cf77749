"""The product of activations and a matrix in floating point, a row the same bits in every batch.

A result is one running sum over the inputs in their order. How many inputs a step of it takes, and
which instructions multiply them, follows from the tile, which is the same for any number of rows:
where there are fewer, the rest of it is masked. Nor does a sum read any other row or column. So a
token's result depends neither on who shares its tile nor on its place there (Thinking Machines,
"Defeating Nondeterminism in LLM Inference", 2025). Libraries as cuBLAS choose by the number of rows
how they sum. A program does one tile of the output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagewire.kernels.gpu.arguments import FLOATS, require, require_array
from pagewire.kernels.gpu.matmul_tile import GROUP_TILES, Tile
from pagewire.kernels.gpu.variant import LaunchConfig, Variant

# As few tokens as a warp group of Hopper multiplies at once: a decode step has no more, and waits
# for the matrix anyway.
_TILE = Tile(tokens=64, outputs=128, inputs=64, launch=LaunchConfig(num_warps=4, num_stages=4))
# Tensor cores have no float32: all of it is added up in registers.
_WIDE_TILE = Tile(tokens=32, outputs=64, inputs=32, launch=LaunchConfig(num_warps=4, num_stages=3))


@triton.jit(do_not_specialize=["num_tokens"])
def _invariant_matmul_kernel(
    x_ptr: tl.tensor,  # [num_tokens, num_inputs]
    weight_ptr: tl.tensor,  # of the same dtype [num_outputs, num_inputs]
    bias_ptr: tl.tensor,  # [num_outputs], or None
    out_ptr: tl.tensor,  # [num_tokens, num_outputs]
    num_tokens: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP_TILES: tl.constexpr,
) -> None:
    tile_m, tile_n = tl.swizzle2d(
        tl.program_id(0),
        tl.program_id(1),
        tl.num_programs(0),
        tl.num_programs(1),
        GROUP_TILES,
    )
    token = tile_m * TOKENS + tl.arange(0, TOKENS)
    output = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
    has_token, has_output = token < num_tokens, output < num_outputs
    x_at = x_ptr + token.to(tl.int64)[:, None] * num_inputs
    weight_at = weight_ptr + output.to(tl.int64)[None, :] * num_inputs
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(0, num_inputs, INPUTS):
        column = start + tl.arange(0, INPUTS)
        inside = column < num_inputs
        x = tl.load(x_at + column[None, :], mask=has_token[:, None] & inside[None, :], other=0.0)
        weight = tl.load(
            weight_at + column[:, None], mask=inside[:, None] & has_output[None, :], other=0.0
        )
        total = tl.dot(x, weight, total, input_precision="ieee")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + output, mask=has_output, other=0.0)
        total += bias.to(tl.float32)[None, :]
    tl.store(
        out_ptr + token.to(tl.int64)[:, None] * num_outputs + output[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=has_token[:, None] & has_output[None, :],
    )


def invariant_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """x @ weightᵀ + bias in `dtype`, [num_tokens, num_outputs], summed and rounded once in float32.

    x: floating [num_tokens, num_inputs]; weight: [num_outputs, num_inputs] and bias: [num_outputs],
    of the dtype of x; all contiguous. Raises KernelArgumentError.
    """
    require_array("x", x, (None, None), *FLOATS)
    num_tokens, num_inputs = x.shape
    require_array("weight", weight, (None, num_inputs), x.dtype, device=x.device)
    num_outputs = len(weight)
    if bias is not None:
        require_array("bias", bias, (num_outputs,), x.dtype, device=x.device)
    require(dtype in FLOATS, f"dtype is {dtype}; give one of {', '.join(map(str, FLOATS))}")
    tile = _WIDE_TILE if x.dtype is torch.float32 else _TILE
    out = torch.empty((num_tokens, num_outputs), dtype=dtype, device=x.device)
    grid = (triton.cdiv(num_tokens, tile.tokens), triton.cdiv(num_outputs, tile.outputs))
    _invariant_matmul_kernel[grid](
        x,
        weight,
        bias,
        out,
        num_tokens,
        num_outputs,
        num_inputs,
        tile.tokens,
        tile.outputs,
        tile.inputs,
        GROUP_TILES,
        num_warps=tile.launch.num_warps,
        num_stages=tile.launch.num_stages,
    )
    return out


def _variant(dtype: str, *, out: str | None = None, bias: bool = False) -> Variant:
    """`out`: dtype of results; None: that of the matrix."""
    tile = _WIDE_TILE if dtype == "fp32" else _TILE
    notes = (f"to {out}" if out else "", "with a bias" if bias else "")
    return Variant(
        name=" ".join(filter(None, (f"invariant_matmul {dtype} {tile.name}", *notes))),
        kernel=_invariant_matmul_kernel,
        arguments={
            "x_ptr": f"*{dtype}:16",
            "weight_ptr": f"*{dtype}:16",
            **({"bias_ptr": f"*{dtype}:16"} if bias else {}),
            "out_ptr": f"*{out or dtype}:16",
            "num_tokens": "i32",
            "num_outputs": "i32:16",
            "num_inputs": "i32:16",
        },
        constants={
            **({} if bias else {"bias_ptr": None}),
            "TOKENS": tile.tokens,
            "OUTPUTS": tile.outputs,
            "INPUTS": tile.inputs,
            "GROUP_TILES": GROUP_TILES,
        },
        launch=tile.launch,
        requires=() if dtype == "fp32" else ("HGMMA",),
    )


VARIANTS = (
    _variant("bf16"),
    _variant("bf16", out="fp32"),
    _variant("bf16", bias=True),
    _variant("fp16"),
    _variant("fp32"),
)
