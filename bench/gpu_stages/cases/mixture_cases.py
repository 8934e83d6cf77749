"""Mixtures of experts: routing, sorting by expert, and the products of all experts at once."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu_stages.cases.kernel_case import KernelCase, NamedCase, Setting
from pagewire.kernels.gpu.activation_quant import quantize_tokens
from pagewire.kernels.gpu.moe_align import UNUSED, ExpertTiles, moe_align
from pagewire.kernels.gpu.moe_matmul import moe_matmul, moe_matmul_8_bits, tile_size
from pagewire.kernels.gpu.moe_route import moe_route

OF_CUBLAS = 0.7  # of the rate of one large product


def route_case(setting: Setting) -> KernelCase:
    """The weight of every expert, 0 of those that a token does not go to."""
    mixture = setting.scale.mixture
    logits = setting.randn(setting.sizes.num_tokens, mixture.num_experts)

    def expected() -> Tensor:
        # Of equally likely experts the first comes first.
        ranked = logits.cpu().double().sort(dim=1, descending=True, stable=True)
        shares = ranked.values.softmax(dim=1)[:, : mixture.top_k]
        shares = shares / shares.sum(dim=1, keepdim=True)
        experts = ranked.indices[:, : mixture.top_k]
        return torch.zeros_like(ranked.values).scatter(1, experts, shares)

    def read(routed: tuple[Tensor, Tensor]) -> Tensor:
        experts, weights = routed
        return torch.zeros_like(logits.float()).scatter(1, experts.long(), weights)

    return KernelCase(
        run=lambda: moe_route(logits, mixture.top_k, renormalize=True),
        read=read,
        expected=expected,
        num_bytes=logits.nbytes + setting.sizes.num_tokens * mixture.top_k * 8,
        max_ratio=None,
    )


def align_case(setting: Setting) -> KernelCase:
    """Every pair behind the others of its expert, in tiles; the first expert has no token."""
    experts, num_experts = _experts(setting), setting.scale.mixture.num_experts
    tile = tile_size(experts.numel(), num_experts)

    def expected() -> Tensor:
        chosen = experts.flatten().tolist()
        tiles: list[list[int]] = []
        owners: list[int] = []
        for expert in range(num_experts):
            pairs = [pair for pair, owner in enumerate(chosen) if owner == expert]
            for start in range(0, len(pairs), tile):
                part = pairs[start : start + tile]
                tiles.append(part + [len(chosen)] * (tile - len(part)))
                owners.append(expert)
        unused = len(chosen) // tile + min(len(chosen), num_experts) - len(tiles)
        tiles += [[len(chosen)] * tile] * unused
        owners += [UNUSED] * unused
        return torch.cat((torch.tensor(tiles).flatten(), torch.tensor(owners))).int()

    def read(tiles: ExpertTiles) -> Tensor:
        return torch.cat((tiles.pairs.flatten(), tiles.experts))

    return KernelCase(
        run=lambda: moe_align(experts, num_experts, tile),
        read=read,
        expected=expected,
        num_bytes=2 * experts.nbytes,
        max_ratio=None,
    )


def product_case(setting: Setting) -> KernelCase:
    """The gate and up matrices of all experts, with tokens that were sorted before."""
    mixture = setting.scale.mixture
    x = setting.randn(setting.sizes.num_tokens, mixture.hidden_size)
    num_outputs = 2 * mixture.intermediate_size
    weight = setting.randn(mixture.num_experts, num_outputs, mixture.hidden_size)
    experts = _experts(setting)
    tile = tile_size(experts.numel(), mixture.num_experts)
    tiles = moe_align(experts, mixture.num_experts, tile)

    return KernelCase(
        run=lambda: moe_matmul(x, weight, tiles),
        expected=lambda: _products(x.double(), lambda expert: weight[expert].double(), experts),
        num_bytes=x.nbytes + weight.nbytes + experts.numel() * num_outputs * x.itemsize,
        flops=2 * experts.numel() * mixture.hidden_size * num_outputs,
        max_ratio=1 / OF_CUBLAS,
    )


def product_8_bits_case(setting: Setting, *, dtype: torch.dtype) -> KernelCase:
    """As `product_case`, with tokens and matrices in 8 bits."""
    mixture, num_tokens = setting.scale.mixture, setting.sizes.num_tokens
    num_outputs = 2 * mixture.intermediate_size
    x, x_scales = quantize_tokens(setting.randn(num_tokens, mixture.hidden_size), dtype)
    rows = setting.randn(mixture.num_experts * num_outputs, mixture.hidden_size)
    flat, flat_scales = quantize_tokens(rows, dtype)
    weight = flat.view(mixture.num_experts, num_outputs, mixture.hidden_size)
    scales = flat_scales.view(mixture.num_experts, num_outputs)
    experts = _experts(setting)
    tile = tile_size(experts.numel(), mixture.num_experts)
    tiles = moe_align(experts, mixture.num_experts, tile)
    floats = setting.scale.torch_dtype
    return KernelCase(
        run=lambda: moe_matmul_8_bits(x, x_scales, weight, scales, tiles, floats),
        expected=lambda: _products(
            x.double() * x_scales.double()[:, None],
            lambda expert: weight[expert].double() * scales[expert].double()[:, None],
            experts,
        ),
        num_bytes=x.nbytes + weight.nbytes + experts.numel() * num_outputs * floats.itemsize,
        flops=2 * experts.numel() * mixture.hidden_size * num_outputs,
        max_ratio=None,
    )


CASES = (
    NamedCase(name="routing to experts", make=route_case),
    NamedCase(name="sorting by expert", make=align_case),
    NamedCase(name="matrix product of all experts", make=product_case),
    NamedCase(
        name="matrix product of all experts in int8",
        make=partial(product_8_bits_case, dtype=torch.int8),
    ),
    NamedCase(
        name="matrix product of all experts in fp8",
        make=partial(product_8_bits_case, dtype=torch.float8_e4m3fn),
        needs_fp8=True,
    ),
)


def _products(x: Tensor, weight_of: Callable[[int], Tensor], experts: Tensor) -> Tensor:
    """Of every pair of a token and one of its experts, one expert after another.

    x: float64 [num_tokens, num_inputs]; `weight_of`: the matrix of an expert, float64; experts:
    [num_tokens, top_k]. Returns [num_tokens * top_k, num_outputs].
    """
    owner = experts.flatten()
    pairs = x.repeat_interleave(experts.shape[1], dim=0)
    out = pairs.new_empty(len(owner), len(weight_of(0)))
    for expert in set(owner.tolist()):
        rows = owner == expert
        out[rows] = pairs[rows] @ weight_of(expert).T
    return out


def _experts(setting: Setting) -> Tensor:
    """int32 [num_tokens, top_k], different ones for a token, never the first."""
    mixture, device = setting.scale.mixture, setting.scale.device
    scores = torch.rand(setting.sizes.num_tokens, mixture.num_experts, device=device)
    scores[:, 0] = -1
    return scores.topk(mixture.top_k, dim=1).indices.int().contiguous()
