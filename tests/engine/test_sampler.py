"""Tokens follow the exact distribution, and depend on the seed and the position alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pagewire.engine import sampler
from pagewire.engine.batch import SamplingParams
from pagewire.engine.sampler import sample, uniform

NUM_DRAWS = 20_000


def exact_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, top-k and top-p one token after another, float64 [vocab_size]."""
    probabilities = (logits.double() / params.temperature).softmax(dim=-1)
    order = probabilities.argsort(descending=True).tolist()
    order = order[: params.top_k or len(order)]
    total = float(probabilities[order].sum())
    kept, mass = [], 0.0
    for token in order:
        if mass >= params.top_p * total:
            break
        kept.append(token)
        mass += float(probabilities[token])
    result = torch.zeros_like(probabilities)
    result[kept] = probabilities[kept]
    return result / result.sum()


def draw(logits: Tensor, params: SamplingParams, count: int) -> Tensor:
    """Counts of each token over `count` output positions."""
    tokens = sample(logits.expand(count, -1), [params] * count, range(count))
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1])


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5, seed=1),
        SamplingParams(temperature=2.0, top_k=5, seed=2),
        SamplingParams(temperature=1.0, top_p=0.7, seed=3),
        SamplingParams(temperature=1.5, top_k=12, top_p=0.8, seed=2**64 - 1),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(params: SamplingParams) -> None:
    torch.manual_seed(0)
    logits = torch.randn(30) * 2
    expected = exact_distribution(logits, params) * NUM_DRAWS

    counts = draw(logits, params, NUM_DRAWS)

    assert counts[expected == 0].sum() == 0
    tested = expected >= 5
    chi_square = ((counts - expected)[tested] ** 2 / expected[tested]).sum()
    # The 99.99 % quantile of chi square, by Wilson and Hilferty.
    freedom = int(tested.sum()) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < quantile


def test_draws_of_many_seeds_follow_the_distribution_too() -> None:
    """The first token of many requests, which differ in their seeds only."""
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(NUM_DRAWS, -1)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(NUM_DRAWS)]
    counts = torch.bincount(torch.tensor(sample(logits, params, [0] * NUM_DRAWS)))
    expected = logits[0].double().softmax(dim=-1) * NUM_DRAWS
    assert ((counts - expected) ** 2 / expected).sum() < 18.4  # 99.99 %, 2 degrees of freedom


def test_greedy_is_the_first_of_the_most_likely_tokens() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, 1.0]])
    assert sample(logits, [SamplingParams()] * 2, [0, 7]) == [1, 0]


def test_greedy_rows_draw_no_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("a random number was drawn")

    monkeypatch.setattr(sampler, "uniform", fail)
    assert sample(torch.eye(3), [SamplingParams()] * 3, [0, 1, 2]) == [0, 1, 2]


sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 5.0]),
    top_p=st.sampled_from([1e-9, 0.2, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 50, 100_000]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(sampling_params, st.integers(0, 2**31)), min_size=1, max_size=6))
def test_a_row_samples_the_same_token_in_any_batch(
    rows: list[tuple[SamplingParams, int]],
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(len(rows), 3000)
    params, positions = zip(*rows, strict=True)

    together = sample(logits, params, positions)

    alone = [
        sample(logits[index : index + 1], [row], [position])[0]
        for index, (row, position) in enumerate(rows)
    ]
    assert together == alone


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=1e-30),
    ],
    ids=str,
)
def test_the_narrowest_settings_are_greedy(params: SamplingParams) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 400)
    assert sample(logits, [params] * 50, range(50)) == logits.argmax(dim=-1).tolist()


def test_top_p_beyond_the_shortlist() -> None:
    """A flat distribution needs more tokens than the shortlist has."""
    logits = torch.linspace(1.0, 0.0, 4000)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    kept = exact_distribution(logits, params) > 0
    counts = draw(logits, params, 1000)
    assert counts[~kept].sum() == 0
    assert counts[int(kept.sum()) - 200 : int(kept.sum())].sum() > 0


def test_the_random_numbers_never_change() -> None:
    """They are part of what a seed means: a resumed stream may run on a newer worker."""
    values = uniform([0, 0, 1, 2**64 - 1], [0, 1, 0, 123])
    assert values.tolist() == [
        0.6524484863740322,
        0.1663964394676608,
        0.36818951565166946,
        0.5922307863241688,
    ]
