"""Whether Triton narrows floats on this device as the tests suppose: to nearest, ties to even.

And to the largest number that 8 bits hold, where a value is larger.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_stages.measurement import Measurement
from gpu_stages.scale import Scale

BLOCK = 1024
FP8 = torch.float8_e4m3fn


@triton.jit
def _cast_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


def measure(scale: Scale) -> Iterator[Measurement]:
    on_gpu = scale.device == "cuda"
    for dtype in (torch.float16, torch.bfloat16, FP8) if on_gpu else (torch.float16,):
        x = _values(scale.device)
        out = torch.empty_like(x, dtype=dtype)
        _cast_kernel[(len(x) // BLOCK,)](x, out, BLOCK)
        expected = (x.clamp(-448, 448) if dtype is FP8 else x).to(dtype)
        yield Measurement(
            name=f"float32 cast otherwise than by torch to {str(dtype).removeprefix('torch.')}",
            value=float((out.float() != expected.float()).sum()),
            unit="",
            limit=0.0,
        )


def _values(device: str) -> Tensor:
    """Random numbers of many sizes, and in the first half halves between two of bfloat16."""
    torch.manual_seed(0)
    x = torch.randn(64 * BLOCK) * torch.logspace(-3, 3, 64 * BLOCK)
    ties = x.view(torch.int32)
    half = len(x) // 2
    ties[:half] = ties[:half] & ~0xFFFF | 0x8000
    return x.to(device)
