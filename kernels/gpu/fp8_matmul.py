"""The product of activations and a matrix that are both in float8, by cuBLAS, as torch exposes it.

On CUDA it is the fastest that there is; `w8a8_matmul` computes the same anywhere.
"""

import torch
from torch import Tensor

from pagewire.kernels.gpu.arguments import require, require_scaled_product

MULTIPLE = 16  # of the inputs and outputs of a matrix that cuBLAS takes in float8


def takes_matrix(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether `fp8_matmul` multiplies such a matrix, with results of `dtype`."""
    return (
        weight.is_cuda
        and weight.dtype is torch.float8_e4m3fn
        and dtype is torch.bfloat16
        and all(size % MULTIPLE == 0 for size in weight.shape)
    )


def fp8_matmul(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """(x * x_scales) @ (weight * weight_scales)ᵀ, bfloat16 [num_tokens, num_outputs].

    x: float8_e4m3fn [num_tokens, num_inputs]; weight: float8_e4m3fn [num_outputs, num_inputs];
    x_scales: float32 [num_tokens]; weight_scales: float32 [num_outputs]; all contiguous, on CUDA.
    Raises KernelArgumentError.
    """
    require_scaled_product(x, x_scales, weight, weight_scales, torch.float8_e4m3fn)
    require(
        all(size % MULTIPLE == 0 for size in weight.shape),
        f"the matrix is {list(weight.shape)}; give multiples of {MULTIPLE}, or use w8a8_matmul",
    )
    require(x.is_cuda, f"x is on {x.device}; move it to CUDA, or use w8a8_matmul")
    return torch._scaled_mm(
        x,
        weight.T,  # column-major, as cuBLAS wants it
        scale_a=x_scales[:, None],
        scale_b=weight_scales[None],
        out_dtype=torch.bfloat16,
    )
