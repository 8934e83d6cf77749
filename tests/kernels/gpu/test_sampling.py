"""Sampling and log probabilities in Triton, against the float64 reference and against torch."""

import pytest
import torch
from torch import Tensor

from pagewire.kernels import reference
from pagewire.kernels.gpu.arguments import KernelArgumentError
from pagewire.kernels.gpu.sampling import TritonSamplingPlan, logprobs
from pagewire.kernels.gpu.vocabulary_softmax import BLOCK
from pagewire.kernels.ops import FAULTY, SamplingRows
from pagewire.kernels.torch_ops import TorchOps

OFF = 10**6  # a top-k that keeps all


def rows_of(vocab_size: int, choices: list[tuple[float, int, float, float]]) -> SamplingRows:
    """choices: temperature, top-k, top-p and min-p of each row."""
    temperature, top_k, top_p, min_p = zip(*choices, strict=True)
    return SamplingRows(
        temperature=torch.tensor(temperature),
        top_k=torch.tensor(top_k).clamp(max=vocab_size),
        top_p=torch.tensor(top_p, dtype=torch.float64),
        min_p=torch.tensor(min_p),
        vocab_size=vocab_size,
    )


def middles(distribution: Tensor, tokens: Tensor) -> Tensor:
    """For each token the number in the middle of its share, which nothing but it is drawn by."""
    return distribution.cumsum(dim=0)[tokens] - distribution[tokens] / 2


@pytest.mark.parametrize(
    "choice",
    [
        (1.0, OFF, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.0, 600, 1.0, 0.0),
        (1.0, OFF, 0.5, 0.0),
        (1.3, OFF, 0.95, 0.0),
        (1.0, 40, 0.9, 0.0),
        (1.0, OFF, 1.0, 0.05),
        (1.0, 300, 0.99, 0.01),
        (1.0, OFF, 1e-6, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [30, BLOCK + 900])
def test_the_least_likely_that_are_kept_have_their_share(
    vocab_size: int, choice: tuple[float, int, float, float]
) -> None:
    """One token more or less at a threshold would show."""
    torch.manual_seed(vocab_size)
    temperature, top_k, top_p, min_p = choice
    # Coarse steps, so that ties are common and no threshold is a matter of rounding.
    logits = (torch.randn(vocab_size) * 3 * 16).round() / 16
    distribution = reference.next_token_distribution(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    ranked = distribution.argsort(descending=True)
    expected = ranked[distribution[ranked] > 1e-5][-3:]
    rows = rows_of(vocab_size, [choice] * len(expected))
    tokens = TritonSamplingPlan(rows).run(
        logits.repeat(len(expected), 1), middles(distribution, expected)
    )
    assert torch.equal(tokens, expected)


def test_rows_of_all_kinds_in_one_batch() -> None:
    """As torch chooses; but for one draw, whose random number lies between two roundings."""
    torch.manual_seed(0)
    vocab_size = 2 * BLOCK + 100
    kinds = [(1.0, OFF, 1.0, 0.0), (0.7, 50, 0.95, 0.0), (1.0, OFF, 0.9, 0.0)]
    kinds += [(0.0, OFF, 1.0, 0.0), (1.3, 5000, 0.8, 0.0), (1e-30, OFF, 1.0, 0.1)]
    rows = rows_of(vocab_size, kinds)
    logits = torch.randn(len(kinds), vocab_size) * 2
    uniform = torch.rand(len(kinds), dtype=torch.float64)
    tokens = TritonSamplingPlan(rows).run(logits, uniform)
    expected = TorchOps().plan_sampling(rows).run(logits, uniform)
    assert int((tokens != expected).sum()) <= 1


def test_greedy_takes_the_first_of_the_most_likely() -> None:
    logits = torch.zeros(3, 2 * BLOCK)
    logits[0, [BLOCK - 1, BLOCK, BLOCK + 7]] = 1.0
    logits[1, BLOCK + 7] = 1e-30
    rows = rows_of(2 * BLOCK, [(0.0, OFF, 1.0, 0.0)] * 3)
    tokens = TritonSamplingPlan(rows).run(logits, torch.full((3,), 0.99, dtype=torch.float64))
    assert tokens.tolist() == [BLOCK - 1, BLOCK + 7, 0]


def test_forbidden_tokens_are_never_drawn() -> None:
    """Not even by the largest and the smallest random number, nor if a whole block is forbidden."""
    logits = torch.full((4, BLOCK + 20), -torch.inf)
    logits[:, BLOCK + 3 : BLOCK + 6] = torch.tensor([1.0, 2.0, 3.0])
    choices = [(1.0, OFF, 1.0, 0.0), (1.0, OFF, 1.0, 0.0), (1.0, 100, 1.0, 0.0)]
    rows = rows_of(BLOCK + 20, [*choices, (1.0, OFF, 0.999999, 0.0)])
    uniform = torch.tensor([0.0, 1 - 2**-53, 1 - 2**-53, 0.0], dtype=torch.float64)
    tokens = TritonSamplingPlan(rows).run(logits, uniform) - BLOCK
    assert tokens.tolist() == [3, 5, 5, 3]


def test_rows_from_which_no_token_can_be_chosen() -> None:
    logits = torch.randn(5, 100)
    logits[1, 50] = torch.nan
    logits[2, 50] = torch.inf
    logits[4] = -torch.inf
    rows = rows_of(100, [(1.0, 50, 0.9, 0.1)] * 4 + [(0.0, OFF, 1.0, 0.0)])
    uniform = torch.full((5,), 0.5, dtype=torch.float64)
    tokens = TritonSamplingPlan(rows).run(logits, uniform)
    assert (tokens == FAULTY).tolist() == [False, True, True, False, True]


def test_logits_are_not_changed() -> None:
    logits = torch.randn(2, 100)
    before = logits.clone()
    rows = rows_of(100, [(1.0, 5, 0.9, 0.1), (0.0, OFF, 1.0, 0.0)])
    TritonSamplingPlan(rows).run(logits, torch.full((2,), 0.5, dtype=torch.float64))
    assert torch.equal(logits, before)


@pytest.mark.slow
def test_draws_have_the_distribution() -> None:
    """Chi-square of 1,000 draws of 20 tokens; 43.8 is the 0.1 % quantile of 19 degrees."""
    torch.manual_seed(0)
    count, vocab_size = 1_000, 20
    logits = torch.randn(vocab_size)
    uniform = torch.rand(count, dtype=torch.float64)
    rows = rows_of(vocab_size, [(1.0, OFF, 1.0, 0.0)] * count)
    tokens = TritonSamplingPlan(rows).run(logits.repeat(count, 1), uniform)
    expected = logits.double().softmax(dim=0) * count
    found = torch.bincount(tokens, minlength=vocab_size)
    assert float(((found - expected) ** 2 / expected).sum()) < 43.8


def test_logprobs() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, BLOCK + 20) * 4 + 100
    logits[2, 21:] = -torch.inf
    rows, tokens = torch.tensor([2, 0]), torch.tensor([7, BLOCK + 1])
    values = logprobs(logits, rows, tokens, 5)
    expected = logits[rows].double().log_softmax(dim=-1)
    torch.testing.assert_close(values.sampled, expected[range(2), tokens], rtol=1e-6, atol=2e-6)
    top = expected.topk(5)
    assert torch.equal(values.top_ids, top.indices)
    torch.testing.assert_close(values.top, top.values, rtol=1e-6, atol=2e-6)


def test_tensors_that_do_not_fit_are_refused() -> None:
    plan = TritonSamplingPlan(rows_of(40, [(1.0, OFF, 1.0, 0.0)] * 2))
    uniform = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(KernelArgumentError, match=r"temperature is \[2\]; give \[3\]"):
        plan.run(torch.zeros(3, 40), uniform)
    with pytest.raises(KernelArgumentError, match=r"vocabulary of 40.*41"):
        plan.run(torch.zeros(2, 41), uniform)
    with pytest.raises(KernelArgumentError, match="logits is not contiguous"):
        plan.run(torch.zeros(40, 2).T, uniform)
    with pytest.raises(KernelArgumentError, match=r"uniform is torch\.float32"):
        plan.run(torch.zeros(2, 40), uniform.float())
