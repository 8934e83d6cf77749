"""Tokens follow the exact distribution, and depend on the seed and the position alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, load_implementation
from torch import Tensor

from pagewire.engine.sampler import Sampler
from pagewire.engine.sampling_params import SamplingParams
from pagewire.engine.token_history import TokenHistory
from pagewire.kernels import reference
from pagewire.kernels.ops import LogitsError, Ops

NUM_DRAWS = 4_000
VOCAB_SIZE = 30
PROMPT, OUTPUT = (1, 2, 2, 3), (3, 4, 4, 4, 29)


@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return load_implementation(request.param)


def history(params: SamplingParams) -> TokenHistory | None:
    return TokenHistory(PROMPT, OUTPUT) if params.has_penalties else None


def sample(
    logits: Tensor, params: list[SamplingParams], positions: list[int], sampler: Sampler
) -> list[int]:
    known = {row: history(row) for row in params}
    histories = [known[row] for row in params]
    return sampler.sample(logits, tuple(params), positions, histories).token_ids


def exact_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The definition, one token after another, float64 [vocab_size]."""
    logits = logits.double().clone()
    for token, bias in params.logit_bias:
        logits[token] += bias
    for token in {*PROMPT, *OUTPUT}:
        value = float(logits[token])
        factor = params.repetition_penalty
        value = value / factor if value > 0 else value * factor
        count = OUTPUT.count(token)
        value -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        logits[token] = value
    return reference.next_token_distribution(
        logits,
        temperature=params.temperature,
        top_k=params.top_k or len(logits),
        top_p=params.top_p,
        min_p=params.min_p,
    )


def draw(ops: Ops, logits: Tensor, params: SamplingParams, count: int) -> Tensor:
    """Counts of each token over `count` output positions."""
    rows = logits.repeat(count, 1)
    tokens = sample(rows, [params] * count, list(range(count)), Sampler(ops))
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5, "seed": 1},
        {"temperature": 2.0, "top_k": 5, "seed": 2},
        {"top_p": 0.7, "seed": 3},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "seed": 2**64 - 1},
        {"min_p": 0.1, "seed": 4},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "seed": 5},
        {"presence_penalty": 1.5, "seed": 6},
        {"frequency_penalty": 0.7, "seed": 7},
        {"frequency_penalty": -0.3, "presence_penalty": -0.4, "seed": 8},
        {"repetition_penalty": 1.8, "seed": 9},
        {"repetition_penalty": 0.7, "frequency_penalty": 0.2, "temperature": 2.0, "seed": 10},
        {"logit_bias": ((0, 3.0), (5, -2.0), (7, -100.0)), "seed": 11},
        {"logit_bias": ((4, 4.0),), "repetition_penalty": 1.3, "temperature": 0.8, "seed": 12},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(ops: Ops, fields: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(VOCAB_SIZE) * 2
    params = SamplingParams(**{"temperature": 1.0, **fields})
    expected = exact_distribution(logits, params) * NUM_DRAWS

    counts = draw(ops, logits, params, NUM_DRAWS)

    assert counts[expected == 0].sum() == 0
    tested = expected >= 5
    chi_square = ((counts - expected)[tested] ** 2 / expected[tested]).sum()
    # The 99.99 % quantile of chi square, by Wilson and Hilferty.
    freedom = int(tested.sum()) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < quantile


def test_draws_of_many_seeds_follow_the_distribution_too(ops: Ops) -> None:
    """The first token of many requests, which differ in their seeds only."""
    logits = torch.tensor([0.0, 1.0, 2.0]).repeat(NUM_DRAWS, 1)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(NUM_DRAWS)]
    counts = torch.bincount(torch.tensor(sample(logits, params, [0] * NUM_DRAWS, Sampler(ops))))
    expected = logits[0].double().softmax(dim=-1) * NUM_DRAWS
    assert ((counts - expected) ** 2 / expected).sum() < 18.4  # 99.99 %, 2 degrees of freedom


def test_greedy_is_the_first_of_the_most_likely_tokens(ops: Ops) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, 1.0]])
    assert sample(logits, [SamplingParams()] * 2, [0, 7], Sampler(ops)) == [1, 0]


def test_penalties_and_bias_change_a_greedy_choice(ops: Ops) -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[:, 4] = 1.0
    params = [
        SamplingParams(),
        SamplingParams(presence_penalty=1.5),
        SamplingParams(logit_bias=((9, 2.0),)),
    ]
    assert sample(logits, params, [0, 0, 0], Sampler(ops)) == [4, 0, 9]


sampling_params = st.builds(
    SamplingParams,
    max_tokens=st.just(100),
    min_tokens=st.sampled_from([0, 50]),
    temperature=st.sampled_from([0.0, 1e-40, 0.3, 1.0, 5.0]),
    top_p=st.sampled_from([1e-9, 0.2, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 50, 2000, 100_000]),
    min_p=st.sampled_from([0.0, 0.01, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    logit_bias=st.sampled_from([(), ((3, 5.0), (2000, -1.0))]),
    stop_token_ids=st.sampled_from([frozenset(), frozenset({3, 8})]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=30)
@given(rows=st.lists(st.tuples(sampling_params, st.integers(0, 2**31)), min_size=1, max_size=6))
def test_a_row_samples_the_same_token_in_any_batch(
    ops: Ops,
    rows: list[tuple[SamplingParams, int]],
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(len(rows), 3000)
    before = logits.clone()
    params, positions = (list(column) for column in zip(*rows, strict=True))
    sampler = Sampler(ops)  # one, so that what it keeps from another batch would show

    together = sample(logits, params, positions, sampler)

    alone = [
        sample(logits[index : index + 1], [row], [position], sampler)[0]
        for index, (row, position) in enumerate(rows)
    ]
    assert together == alone
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=1.0, min_p=1.0),
        SamplingParams(temperature=1e-30),
    ],
    ids=str,
)
def test_the_narrowest_settings_are_greedy(ops: Ops, params: SamplingParams) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 400)
    tokens = sample(logits, [params] * 50, list(range(50)), Sampler(ops))
    assert tokens == logits.argmax(dim=-1).tolist()


def test_top_p_beyond_the_shortlist(ops: Ops) -> None:
    """A flat distribution needs more tokens than the shortlist has."""
    logits = torch.linspace(1.0, 0.0, 4000)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    probabilities = logits.double().softmax(dim=-1)
    num_kept = int((probabilities.cumsum(dim=-1) < 0.9).sum()) + 1
    counts = draw(ops, logits, params, 1000)
    assert counts[num_kept:].sum() == 0
    assert counts[num_kept - 200 : num_kept].sum() > 0


@settings(max_examples=30)
@given(position=st.integers(0, 9), temperature=st.sampled_from([0.0, 1.0]))
def test_no_stop_token_before_min_tokens(ops: Ops, position: int, temperature: float) -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [3, 8]] = 50.0
    params = SamplingParams(temperature=temperature, min_tokens=5, stop_token_ids=frozenset({3, 8}))
    (token,) = sample(logits, [params], [position], Sampler(ops))
    assert (token in params.stop_token_ids) == (position >= 5)


def test_logprobs_are_those_of_the_model(ops: Ops) -> None:
    """Whatever the parameters do to the distribution that is drawn from."""
    torch.manual_seed(0)
    logits = torch.randn(3, 700) * 3
    params = (
        SamplingParams(temperature=0.3, top_k=5, logit_bias=((6, 90.0),), num_logprobs=4),
        SamplingParams(),
        SamplingParams(num_logprobs=0),
    )

    result = Sampler(ops).sample(logits, params, [0, 0, 0], [None] * 3)

    expected = logits.double().log_softmax(dim=-1)
    assert list(result.logprobs) == [0, 2]
    (first,), (last,) = result.logprobs[0], result.logprobs[2]
    assert result.token_ids[0] == 6
    assert first.logprob == pytest.approx(float(expected[0, 6]), abs=1e-5)
    assert last.logprob == pytest.approx(float(expected[2].max()), abs=1e-5)
    assert last.top == ()
    values, ids = expected[0].topk(4)
    assert [token for token, _ in first.top] == ids.tolist()
    assert [value for _, value in first.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_rows_without_a_most_likely_token_are_named(ops: Ops) -> None:
    logits = torch.zeros(4, 40)
    logits[1, 7] = torch.nan
    logits[3, 7] = torch.inf
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_p=0.5)):
        with pytest.raises(LogitsError, match="logits of rows 1, 3 hold NaN") as caught:
            sample(logits, [params] * 4, [0] * 4, Sampler(ops))
        assert caught.value.rows == [1, 3]


def test_logits_are_put_back_when_sampling_fails(ops: Ops) -> None:
    logits = torch.zeros(2, 40)
    logits[1] = -torch.inf
    before = logits.clone()
    params = SamplingParams(logit_bias=((3, 5.0),), presence_penalty=1.0)
    with pytest.raises(LogitsError):
        sample(logits, [params] * 2, [0] * 2, Sampler(ops))
    assert torch.equal(logits, before)
