"""Products with matrices in 8 and 4 bits, the small ones of LoRA, and those of `deterministic`."""

from functools import partial

import torch
from torch import Tensor

from gpu_stages.cases.kernel_case import KernelCase, NamedCase, Setting
from pagewire.kernels.gpu.activation_quant import quantize_tokens
from pagewire.kernels.gpu.fp8_matmul import fp8_matmul
from pagewire.kernels.gpu.invariant_matmul import invariant_matmul
from pagewire.kernels.gpu.lora_expand import lora_expand
from pagewire.kernels.gpu.lora_segments import NO_ADAPTER, LoraSegments
from pagewire.kernels.gpu.lora_shrink import lora_shrink
from pagewire.kernels.gpu.w4a16_matmul import GROUP, pack_int4, w4a16_matmul
from pagewire.kernels.gpu.w8a8_matmul import w8a8_matmul

NUM_ADAPTERS, RANK = 8, 16
LORA_SHARE = 0.1  # that adapters may add to the product of their matrix
_FP8 = torch.float8_e4m3fn


def eight_bits_case(
    setting: Setting, *, dtype: torch.dtype, by_torch: bool = False, faster: float | None
) -> KernelCase:
    """`faster`: as many times as a product in 16 bits must take."""
    scale, num_tokens = setting.scale, setting.sizes.num_tokens
    num_inputs, num_outputs = _gate_up_shape(setting)
    x, x_scales = quantize_tokens(setting.randn(num_tokens, num_inputs), dtype)
    weight, weight_scales = quantize_tokens(setting.randn(num_outputs, num_inputs), dtype)

    def run() -> Tensor:
        if by_torch:
            return fp8_matmul(x, x_scales, weight, weight_scales)
        return w8a8_matmul(x, x_scales, weight, weight_scales, scale.torch_dtype)

    def expected() -> Tensor:
        product = x.double() @ weight.double().T
        return product * x_scales.double()[:, None] * weight_scales.double()

    return KernelCase(
        run=run,
        expected=expected,
        num_bytes=x.nbytes + weight.nbytes + num_tokens * num_outputs * scale.torch_dtype.itemsize,
        flops=2 * num_tokens * num_inputs * num_outputs,
        max_ratio=1 / faster if faster else None,
    )


def four_bits_case(setting: Setting) -> KernelCase:
    """Few tokens, as of a decode step: reading the matrix is all that it costs."""
    num_tokens = setting.sizes.few_tokens
    num_inputs, num_outputs = _gate_up_shape(setting)
    num_inputs = -(-num_inputs // GROUP) * GROUP
    x = setting.randn(num_tokens, num_inputs)
    groups = num_inputs // GROUP, num_outputs
    quants = setting.integers(16, num_outputs, num_inputs).to(torch.uint8)
    zeros = setting.integers(16, *groups).to(torch.uint8)
    scales = (setting.randn(*groups) / 16).contiguous()
    weight = pack_int4(quants)

    def expected() -> Tensor:
        exact = quants.double() - zeros.double().repeat_interleave(GROUP, dim=0).T
        # The kernel rounds each number of the matrix to the dtype of x, as any that unpacks them.
        exact = (exact * scales.double().repeat_interleave(GROUP, dim=0).T).to(x.dtype)
        return x.double() @ exact.double().T

    return KernelCase(
        run=lambda: w4a16_matmul(x, weight, scales, zeros),
        expected=expected,
        num_bytes=weight.nbytes + scales.nbytes + zeros.nbytes,
        max_ratio=1.6,
    )


def lora_case(setting: Setting) -> KernelCase:
    """A decode step whose rows have adapters in turns, and every ninth none."""
    num_tokens = setting.sizes.num_rows
    num_inputs, num_outputs = _gate_up_shape(setting)
    adapters = [row % (NUM_ADAPTERS + 1) - 1 for row in range(num_tokens)]
    assert NO_ADAPTER == -1
    device = setting.scale.device
    segments = LoraSegments(
        starts=torch.arange(num_tokens + 1, dtype=torch.int32, device=device),
        adapters=torch.tensor(adapters, dtype=torch.int32, device=device),
        max_tokens=1,
    )
    x, out = setting.randn(num_tokens, num_inputs), setting.randn(num_tokens, num_outputs)
    a = setting.randn(NUM_ADAPTERS, RANK, num_inputs)
    b = setting.randn(NUM_ADAPTERS, RANK, num_outputs)
    scales = torch.rand(NUM_ADAPTERS, device=device)

    def expected() -> Tensor:
        changed = out.double()
        for row, adapter in enumerate(adapters):
            if adapter != NO_ADAPTER:
                change = x[row].double() @ a[adapter].double().T @ b[adapter].double()
                changed[row] += scales[adapter].double() * change
        return changed

    num_bytes = a.nbytes + b.nbytes + x.nbytes + 2 * out.nbytes
    return KernelCase(
        run=lambda: lora_expand(lora_shrink(x, a, segments), b, scales, segments, out),
        read=lambda _: out,
        expected=expected,
        num_bytes=num_bytes,
        max_ratio=LORA_SHARE * num_inputs * num_outputs * x.itemsize / num_bytes,
    )


def invariant_case(setting: Setting) -> KernelCase:
    """In the dtype of the scale; the stage of determinism measures its time."""
    num_inputs, num_outputs = _gate_up_shape(setting)
    x = setting.randn(setting.sizes.num_tokens, num_inputs)
    weight, bias = setting.randn(num_outputs, num_inputs), setting.randn(num_outputs)
    return KernelCase(
        run=lambda: invariant_matmul(x, weight, bias, dtype=x.dtype),
        expected=lambda: x.double() @ weight.double().T + bias.double(),
        num_bytes=x.nbytes + weight.nbytes,
        max_ratio=None,
    )


CHECKED = (NamedCase(name="matrix product, the same in every batch", make=invariant_case),)
CASES = (
    # Against the rate of 16 bits, of which they must be so many times.
    NamedCase(
        name="matrix product in int8", make=partial(eight_bits_case, dtype=torch.int8, faster=1.3)
    ),
    NamedCase(
        name="matrix product in fp8 by torch",
        make=partial(eight_bits_case, dtype=_FP8, by_torch=True, faster=1.6),
        needs_fp8=True,
    ),
    NamedCase(
        name="matrix product in fp8 by Triton, for comparison",
        make=partial(eight_bits_case, dtype=_FP8, faster=None),
        needs_fp8=True,
    ),
    NamedCase(name="matrix product in int4, few tokens", make=four_bits_case),
    NamedCase(name="LoRA shrink and expand", make=lora_case),
)


def _gate_up_shape(setting: Setting) -> tuple[int, int]:
    """(inputs, outputs) of the largest matrix of a layer."""
    return setting.scale.model.hidden_size, 2 * setting.scale.model.intermediate_size
