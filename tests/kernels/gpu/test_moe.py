"""Mixtures of experts against float64: routing, sorting into tiles, and the products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import TOLERANCE, assert_close
from torch import Tensor

from pagewire.kernels import reference
from pagewire.kernels.experts import Routing
from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.grouped_experts import GroupedExperts, group_experts
from pagewire.kernels.gpu.moe_align import UNUSED, moe_align
from pagewire.kernels.gpu.moe_matmul import moe_matmul, moe_matmul_8_bits, tile_size
from pagewire.kernels.gpu.moe_route import moe_route


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (12, 3), (5, 5)])
def test_route(num_experts: int, top_k: int, renormalize: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, num_experts) * 2
    experts, weights = moe_route(logits, top_k, renormalize=renormalize)
    expected = logits.double().softmax(dim=1).topk(top_k)
    shares = expected.values
    if renormalize:
        shares = shares / shares.sum(dim=1, keepdim=True)
    assert torch.equal(experts, expected.indices.int())
    assert_close(weights, shares)


def test_equally_likely_experts_are_taken_in_their_order() -> None:
    experts, weights = moe_route(torch.zeros(1, 6), 4, renormalize=True)
    assert experts.tolist() == [[0, 1, 2, 3]]
    assert weights.tolist() == [[0.25] * 4]


@settings(max_examples=15)
@given(
    experts=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), max_size=20),
    tile=st.sampled_from([4, 16]),
)
def test_every_pair_is_in_a_tile_of_its_expert(experts: list[list[int]], tile: int) -> None:
    chosen = torch.tensor(experts, dtype=torch.int32).view(-1, 3)
    tiles = moe_align(chosen, 5, tile)
    found: list[int] = []
    for pairs, expert in zip(tiles.pairs.tolist(), tiles.experts.tolist(), strict=True):
        own = [pair for pair in pairs if pair < tiles.num_pairs]
        assert bool(own) == (expert != UNUSED)
        assert own == sorted(own)
        assert all(chosen.flatten()[pair] == expert for pair in own)
        found += own
    assert sorted(found) == list(range(chosen.numel()))


def experts_of(
    num_experts: int, size: int, dim: int, dtype: torch.dtype, *, invariant: bool = False
) -> GroupedExperts:
    return group_experts(
        gate_up=(torch.randn(num_experts, 2 * size, dim) / dim**0.5).to(dtype).unbind(),
        down=(torch.randn(num_experts, dim, size) / size**0.5).to(dtype).unbind(),
        invariant=invariant,
    )


def routing_of(logits: Tensor, top_k: int) -> Routing:
    experts, weights = moe_route(logits, top_k, renormalize=True)
    return Routing(experts=experts.long(), weights=weights)


def expected_sum(x: Tensor, logits: Tensor, experts: GroupedExperts, top_k: int) -> Tensor:
    """Token by token, with weights that add up to 1."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    shares, chosen = logits.double().softmax(dim=1).topk(top_k)
    shares = shares / shares.sum(dim=1, keepdim=True)
    for token, row in enumerate(x.double()):
        for share, expert in zip(shares[token], chosen[token], strict=True):
            gate, up = (experts.gate_up[expert].double() @ row).chunk(2)
            out[token] += share * (experts.down[expert].double() @ reference.silu_mul(gate, up))
    return out


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mixture_of_experts(dtype: torch.dtype, invariant: bool) -> None:
    """One expert gets no token, and another all of them."""
    torch.manual_seed(0)
    num_tokens, num_experts, size, dim = 9, 4, 72, 160
    x = torch.randn(num_tokens, dim).to(dtype)
    logits = torch.randn(num_tokens, num_experts)
    logits[:, 1] = 10
    logits[:, 3] = -10
    experts = experts_of(num_experts, size, dim, dtype, invariant=invariant)
    out = experts(x, routing_of(logits, 2))
    # Four results are rounded to the dtype one after another.
    assert_close(out, expected_sum(x, logits, experts, 2), 2 * TOLERANCE[dtype])


def test_large_tiles() -> None:
    torch.manual_seed(0)
    num_tokens, num_experts, num_outputs, num_inputs = 130, 2, 140, 80
    assert tile_size(num_tokens, num_experts) == 64
    x, weight = torch.randn(num_tokens, num_inputs), torch.randn(2, num_outputs, num_inputs)
    experts = torch.randint(0, num_experts, (num_tokens, 1), dtype=torch.int32)
    factors = torch.rand(num_tokens)
    out = moe_matmul(x, weight, moe_align(experts, num_experts, 64), factors)
    expected = torch.einsum("ti,toi->to", x.double(), weight[experts[:, 0]].double())
    assert_close(out, expected * factors[:, None])


def test_a_token_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    x, logits, order = torch.randn(7, 160), torch.randn(7, 4), torch.randperm(7)
    experts = experts_of(4, 72, 160, torch.float32)
    out = experts(x, routing_of(logits, 2))
    shuffled = experts(x[order], routing_of(logits[order], 2))
    assert torch.equal(shuffled, out[order])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_token_has_the_same_bits_among_any_number_of_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_tokens, num_experts = 100, 3
    x, logits = torch.randn(num_tokens, 40).to(dtype), torch.randn(num_tokens, num_experts)
    assert tile_size(2 * num_tokens, num_experts) != tile_size(2, num_experts)
    experts = experts_of(num_experts, 24, 40, dtype, invariant=True)
    together = experts(x, routing_of(logits, 2))
    for part in (slice(0, 1), slice(1, 30), slice(97, 100)):
        assert torch.equal(experts(x[part], routing_of(logits[part], 2)), together[part])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelArgumentError, match="top_k is 5; give 1 to 4"):
        moe_route(torch.zeros(2, 4), 5, renormalize=False)
    experts = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(KernelArgumentError, match="tile is 24"):
        moe_align(experts, 4, 24)
    tiles = moe_align(experts, 4, 16)
    with pytest.raises(KernelArgumentError, match="x has 3 rows for 4 pairs"):
        moe_matmul(torch.zeros(3, 8), torch.zeros(4, 8, 8), tiles)
    with pytest.raises(KernelArgumentError, match=r"factors is \[3\]; give \[4\]"):
        moe_matmul(torch.zeros(2, 8), torch.zeros(4, 8, 8), tiles, torch.zeros(3))
    x, weight = torch.zeros(2, 8, dtype=torch.int8), torch.zeros(4, 8, 8, dtype=torch.int8)
    with pytest.raises(KernelArgumentError, match=r"x_scales is \[3\]; give \[2\]"):
        moe_matmul_8_bits(x, torch.ones(3), weight, torch.ones(4, 8), tiles, torch.float32)
    with pytest.raises(KernelArgumentError, match=r"weight_scales is \[8\]; give \[4, 8\]"):
        moe_matmul_8_bits(x, torch.ones(2), weight, torch.ones(8), tiles, torch.float32)
    with pytest.raises(KernelArgumentError, match=r"weight is torch.float32; give torch.int8"):
        moe_matmul_8_bits(x, torch.ones(2), weight.float(), torch.ones(4, 8), tiles, torch.float32)
    with pytest.raises(KernelArgumentError, match=r"dtype is torch.int8"):
        moe_matmul_8_bits(x, torch.ones(2), weight, torch.ones(4, 8), tiles, torch.int8)
