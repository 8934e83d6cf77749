"""Norms, activations and what narrows them to 8 bits: one pass over memory each."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu_stages.cases.kernel_case import KernelCase, NamedCase, Setting, same_bytes
from pagewire.kernels import reference
from pagewire.kernels.gpu.activation_quant import quantize_tokens
from pagewire.kernels.gpu.rms_norm import add_rms_norm, rms_norm
from pagewire.kernels.gpu.rms_norm_quant import add_rms_norm_quant
from pagewire.kernels.gpu.silu_mul import silu_mul
from pagewire.kernels.gpu.silu_mul_quant import silu_mul_quant
from pagewire.kernels.kv_pool import quantize_vectors

EPS = 1e-5
Quantized = tuple[Tensor, Tensor]


def rms_norm_case(setting: Setting) -> KernelCase:
    """Of a sum, which overwrites the residual."""
    x, residual, weight = _norm_inputs(setting)
    total = (x.float() + residual.float()).to(x.dtype)
    return KernelCase(
        run=lambda: add_rms_norm(x, residual, weight, EPS),
        read=torch.cat,
        expected=lambda: torch.cat(
            (reference.rms_norm(total.cpu(), weight.cpu(), EPS), total.cpu().double())
        ),
        num_bytes=4 * x.nbytes,
        max_ratio=1.2,
    )


def rms_norm_quant_case(setting: Setting, *, dtype: torch.dtype) -> KernelCase:
    """As the norm gives it and torch narrows it."""
    x, residual, weight = _norm_inputs(setting)
    total = (x.float() + residual.float()).to(x.dtype)
    return KernelCase(
        run=lambda: add_rms_norm_quant(x, residual, weight, EPS, dtype),
        read=_bytes,
        expected=lambda: _narrowed(rms_norm(total, weight, EPS), dtype),
        num_bytes=3 * x.nbytes + x.numel(),
        max_ratio=1.2,
    )


def silu_mul_case(setting: Setting) -> KernelCase:
    gate_up = _gate_up(setting)
    return KernelCase(
        run=lambda: silu_mul(gate_up),
        expected=lambda: reference.silu_mul(*gate_up.cpu().chunk(2, dim=-1)),
        num_bytes=1.5 * gate_up.nbytes,
        max_ratio=1.15,
    )


def silu_mul_quant_case(setting: Setting, *, dtype: torch.dtype) -> KernelCase:
    """As the activation gives it and torch narrows it."""
    gate_up = _gate_up(setting)
    return KernelCase(
        run=lambda: silu_mul_quant(gate_up, dtype),
        read=_bytes,
        expected=lambda: _narrowed(silu_mul(gate_up), dtype),
        num_bytes=gate_up.nbytes + gate_up.numel() / 2,
        max_ratio=1.15,
    )


def quantize_case(setting: Setting, *, dtype: torch.dtype) -> KernelCase:
    x = setting.randn(setting.sizes.num_tokens, setting.scale.model.hidden_size)
    return KernelCase(
        run=lambda: quantize_tokens(x, dtype),
        read=_bytes,
        expected=lambda: _narrowed(x, dtype),
        num_bytes=x.nbytes + x.numel(),
        max_ratio=1.3,
    )


def _in_8_bits(name: str, make: Callable[..., KernelCase]) -> tuple[NamedCase, NamedCase]:
    return (
        NamedCase(name=f"{name} in int8", make=partial(make, dtype=torch.int8)),
        NamedCase(
            name=f"{name} in fp8", make=partial(make, dtype=torch.float8_e4m3fn), needs_fp8=True
        ),
    )


CASES = (
    NamedCase(name="residual and RMSNorm", make=rms_norm_case),
    *_in_8_bits("residual and RMSNorm", rms_norm_quant_case),
    NamedCase(name="SwiGLU", make=silu_mul_case),
    *_in_8_bits("SwiGLU", silu_mul_quant_case),
    *_in_8_bits("activations", quantize_case),
)


def _norm_inputs(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual, [num_tokens, hidden_size]; weight, [hidden_size]."""
    shape = setting.sizes.num_tokens, setting.scale.model.hidden_size
    return setting.randn(*shape), setting.randn(*shape), setting.randn(shape[1])


def _gate_up(setting: Setting) -> Tensor:
    """[num_tokens, 2 * intermediate_size]."""
    return setting.randn(setting.sizes.num_tokens, 2 * setting.scale.model.intermediate_size)


def _bytes(quantized: Quantized) -> Tensor:
    return same_bytes(*quantized)


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What plain torch makes of it on the host."""
    return same_bytes(*quantize_vectors(x.float().cpu(), dtype))
