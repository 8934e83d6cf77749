"""Routing of tokens to experts, and the experts themselves, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from native_kernels import native_library
from torch import Tensor

from pagewire.kernels.experts import Routing, route
from pagewire.kernels.int8_linear import int8_linear
from pagewire.kernels.linear import DenseLinear
from pagewire.kernels.native_linear import native_linear
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.ops import Linear
from pagewire.kernels.sorted_experts import SortedExperts
from pagewire.kernels.torch_ops import TorchOps

NUM_EXPERTS = 5
HIDDEN = 64
SIZE = 96


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


GATE_UP = random(NUM_EXPERTS, 2 * SIZE, HIDDEN, seed=1) / HIDDEN**0.5
DOWN = random(NUM_EXPERTS, HIDDEN, SIZE, seed=2) / SIZE**0.5


def routing_of(num_tokens: int, top_k: int, *, without: int | None = None) -> Routing:
    """Random experts for each token, never the one that is to have none."""
    scores = random(num_tokens, NUM_EXPERTS, seed=3)
    if without is not None:
        scores[:, without] = -torch.inf
    return route(scores, top_k, renormalize=True)


def expected(x: Tensor, routing: Routing) -> Tensor:
    """float64, one token and one expert at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (experts, weights) in enumerate(
        zip(routing.experts.tolist(), routing.weights.double(), strict=True)
    ):
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (GATE_UP[expert].double() @ x[token].double()).chunk(2)
            out[token] += weight * (DOWN[expert].double() @ (F.silu(gate) * up))
    return out


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


def dense(dtype: torch.dtype = torch.float32) -> SortedExperts:
    return SortedExperts(
        gate_up=tuple(DenseLinear(weight=each.to(dtype)) for each in GATE_UP),
        down=tuple(DenseLinear(weight=each.to(dtype)) for each in DOWN),
        ops=TorchOps(),
    )


@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_the_sum_over_experts_is_that_of_the_formula(num_tokens: int, top_k: int) -> None:
    x, routing = random(num_tokens, HIDDEN), routing_of(num_tokens, top_k)
    assert relative_error(dense()(x, routing), expected(x, routing)) < 1e-5


@pytest.mark.parametrize("without", [0, 2, NUM_EXPERTS - 1])
def test_an_expert_may_have_no_token(without: int) -> None:
    x, routing = random(9, HIDDEN), routing_of(9, 2, without=without)
    assert without not in routing.experts
    assert relative_error(dense()(x, routing), expected(x, routing)) < 1e-5


def test_bfloat16_is_rounded_once_a_matrix() -> None:
    x, routing = random(9, HIDDEN).bfloat16(), routing_of(9, 2)
    out = dense(torch.bfloat16)(x, routing)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected(x, routing)) < 1e-2


def test_matrices_of_8_bits_take_their_tokens_quantised() -> None:
    def quantised(weights: Tensor) -> tuple[Linear, ...]:
        return tuple(int8_linear(each, None, dtype=torch.float32, library=None) for each in weights)

    ops = TorchOps()
    experts = SortedExperts(gate_up=quantised(GATE_UP), down=quantised(DOWN), ops=ops)
    x, routing = random(9, HIDDEN), routing_of(9, 2)

    assert experts.takes_quantized
    assert relative_error(experts(ops.quantize(x), routing), expected(x, routing)) < 3e-2
    with pytest.raises(TypeError, match="takes a GroupedActivation"):
        experts(x, routing)


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_token_is_the_same_to_the_bit_in_every_batch(renormalize: bool) -> None:
    library = native_library()
    matrices = [
        tuple(native_linear(each, None, out_dtype=torch.float32, library=library) for each in all_)
        for all_ in (GATE_UP, DOWN)
    ]
    experts = SortedExperts(gate_up=matrices[0], down=matrices[1], ops=NativeOps(library))
    x, scores = random(21, HIDDEN), random(21, NUM_EXPERTS, seed=3)

    def run(rows: slice) -> Tensor:
        return experts(x[rows], route(scores[rows], 3, renormalize=renormalize))

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(4, 6), slice(3, 20)):
        assert torch.equal(run(rows), whole[rows])


def test_memory_is_that_of_all_experts() -> None:
    assert dense().num_bytes == GATE_UP.nbytes + DOWN.nbytes


@pytest.mark.parametrize("renormalize", [False, True])
def test_routing_is_the_softmax_of_the_scores(renormalize: bool) -> None:
    scores = random(7, 16) * 3
    probabilities = scores.double().softmax(dim=-1)
    best = probabilities.sort(dim=-1, descending=True)
    weights = best.values[:, :4]
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)

    routing = route(scores, 4, renormalize=renormalize)

    assert torch.equal(routing.experts, best.indices[:, :4])
    torch.testing.assert_close(routing.weights.double(), weights, rtol=1e-5, atol=1e-7)


def test_routing_computes_in_float32() -> None:
    scores = random(7, 16).bfloat16()
    assert route(scores, 2, renormalize=False).weights.dtype == torch.float32
