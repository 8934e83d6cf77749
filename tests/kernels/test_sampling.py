"""The choice of tokens and their log probabilities, over vocabularies of any size and shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pagewire.kernels import reference
from pagewire.kernels.native_ops import NativeOps
from pagewire.kernels.ops import Ops, SamplingRows
from pagewire.kernels.torch_ops import TorchOps

# Around the lengths of vectors, blocks and chunks, and a real one.
VOCAB_SIZES = (1, 2, 15, 16, 17, 255, 513, 1024, 1025, 3000, 49_152)


def rows_of(
    vocab_size: int,
    temperature: list[float],
    top_k: list[int],
    top_p: list[float],
    min_p: list[float],
) -> SamplingRows:
    return SamplingRows(
        temperature=torch.tensor(temperature),
        top_k=torch.tensor(top_k).clamp(max=vocab_size),
        top_p=torch.tensor(top_p, dtype=torch.float64),
        min_p=torch.tensor(min_p),
        vocab_size=vocab_size,
    )


def token_at(distribution: Tensor, uniform: float) -> int:
    """Where the cumulative distribution passes `uniform`."""
    return int((distribution.cumsum(dim=0) <= uniform).sum())


def is_near_a_boundary(distribution: Tensor, uniform: float) -> bool:
    """Whether a change of the last digits of float32 could select another token."""
    return float((distribution.cumsum(dim=0) - uniform).abs().min()) < 1e-5


@settings(max_examples=60)
@given(
    vocab_size=st.sampled_from(VOCAB_SIZES[:-1]),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.sampled_from([1, 3, 40, 700, 2500, 10**6]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_token_is_where_the_cumulative_distribution_says(
    ops: Ops,
    vocab_size: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    count = 4
    logits = torch.randn(count, vocab_size) * 2
    # Coarse steps, so that ties are common and no threshold is a matter of rounding.
    logits = (logits * 8).round() / 8
    uniform = torch.rand(count, dtype=torch.float64)
    rows = rows_of(
        vocab_size, [temperature] * count, [top_k] * count, [top_p] * count, [min_p] * count
    )

    tokens = ops.plan_sampling(rows).run(logits, uniform).tolist()

    for row, token, share in zip(logits, tokens, uniform.tolist(), strict=True):
        distribution = reference.next_token_distribution(
            row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
        )
        assert distribution[token] > 0
        assert token == token_at(distribution, share) or is_near_a_boundary(distribution, share)


@settings(max_examples=25)
@given(
    vocab_size=st.sampled_from([30, 1025, 3000]),
    top_k=st.sampled_from([5, 600, 2000, 10**6]),
    top_p=st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]),
    scale=st.sampled_from([0.5, 1.5, 4.0]),
    seed=st.integers(0, 1000),
)
def test_the_least_likely_that_are_kept_have_their_share(
    ops: Ops, vocab_size: int, top_k: int, top_p: float, scale: float, seed: int
) -> None:
    """One token more or less would show: each is drawn by the number in the middle of its share."""
    torch.manual_seed(seed)
    logits = (torch.randn(vocab_size) * scale * 16).round() / 16
    distribution = reference.next_token_distribution(
        logits, temperature=1.0, top_k=top_k, top_p=top_p, min_p=0.0
    )
    ranked = distribution.argsort(descending=True)
    kept = ranked[distribution[ranked] > 1e-5][-16:]
    uniform = distribution.cumsum(dim=0)[kept] - distribution[kept] / 2
    count = len(kept)
    rows = rows_of(vocab_size, [1.0] * count, [top_k] * count, [top_p] * count, [0.0] * count)

    tokens = ops.plan_sampling(rows).run(logits.repeat(count, 1), uniform)

    assert torch.equal(tokens, kept)


def test_top_p_ends_in_a_flat_tail(ops: Ops) -> None:
    """Tokens of the tail weigh next to nothing each, and some of them are kept."""
    torch.manual_seed(0)
    vocab_size, num_heavy, num_kept = 3000, 20, 32
    logits = -torch.arange(vocab_size) / vocab_size
    logits[:num_heavy] += 8
    ranked = torch.randperm(vocab_size)
    logits = torch.empty(vocab_size).scatter_(0, ranked, logits)
    probabilities = logits.double().softmax(dim=0)[ranked]
    top_p = float(probabilities[:num_kept].sum() - probabilities[num_kept - 1] / 2)
    kept = ranked[num_heavy:num_kept]
    distribution = torch.zeros(vocab_size, dtype=torch.float64)
    distribution[ranked[:num_kept]] = probabilities[:num_kept] / probabilities[:num_kept].sum()
    uniform = distribution.cumsum(dim=0)[kept] - distribution[kept] / 2
    count = len(kept)
    rows = rows_of(vocab_size, [1.0] * count, [vocab_size] * count, [top_p] * count, [0.0] * count)

    tokens = ops.plan_sampling(rows).run(logits.repeat(count, 1), uniform)

    assert torch.equal(tokens, kept)


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0], ids=["flat", "even", "peaked"])
def test_every_implementation_chooses_the_same_tokens(ops: Ops, scale: float) -> None:
    """But for one draw in a thousand, whose random number lies between two roundings."""
    torch.manual_seed(0)
    count, vocab_size = 48, 49_152
    logits = torch.randn(count, vocab_size) * scale
    uniform = torch.rand(count, dtype=torch.float64)
    kinds = [(1.0, 10**6, 1.0, 0.0), (0.7, 50, 0.95, 0.0), (1.0, 10**6, 0.9, 0.0)]
    kinds += [(0.0, 10**6, 1.0, 0.0), (1.3, 5000, 0.8, 0.0), (1.0, 10**6, 1.0, 0.1)]
    columns = [list(column) for column in zip(*(kinds * (count // len(kinds))), strict=True)]
    temperature, top_k, top_p, min_p = columns
    rows = rows_of(vocab_size, temperature, [int(k) for k in top_k], top_p, min_p)

    tokens = ops.plan_sampling(rows).run(logits, uniform)
    expected = TorchOps().plan_sampling(rows).run(logits, uniform)

    assert int((tokens != expected).sum()) <= 1


@settings(max_examples=40)
@given(
    vocab_size=st.sampled_from(VOCAB_SIZES),
    num_top=st.integers(0, 20),
    seed=st.integers(0, 1000),
    is_masked=st.booleans(),
)
def test_logprobs(ops: Ops, vocab_size: int, num_top: int, seed: int, is_masked: bool) -> None:
    torch.manual_seed(seed)
    num_top = min(num_top, vocab_size)
    logits = torch.randn(3, vocab_size) * 4 + 100
    if is_masked and vocab_size > 30:
        logits[:, 21:] = -torch.inf
    rows, tokens = torch.tensor([2, 0]), torch.randint(vocab_size, (2,))

    values = ops.logprobs(logits, rows, tokens, num_top)

    expected = logits[rows].double().log_softmax(dim=-1)
    torch.testing.assert_close(values.sampled, expected[range(2), tokens], rtol=1e-6, atol=2e-6)
    top = expected.topk(num_top)
    torch.testing.assert_close(values.top, top.values, rtol=1e-6, atol=2e-6)
    # Which of two equal logits comes first is another test's: here each id has its value, once.
    torch.testing.assert_close(expected.gather(1, values.top_ids), values.top, rtol=1e-6, atol=2e-6)
    assert all(len(set(ids)) == num_top for ids in values.top_ids.tolist())


def test_equally_likely_tokens_are_listed_in_their_order(ops: Ops) -> None:
    if isinstance(ops, TorchOps):
        pytest.skip("torch promises no order")
    logits = torch.zeros(1, 5000)
    logits[0, 4000] = 1.0
    values = ops.logprobs(logits, torch.tensor([0]), torch.tensor([7]), 4)
    assert values.top_ids.tolist() == [[4000, 0, 1, 2]]


def test_tokens_do_not_depend_on_threads(ops: Ops) -> None:
    torch.manual_seed(0)
    count, vocab_size = 9, 20_000
    logits, uniform = torch.randn(count, vocab_size), torch.rand(count, dtype=torch.float64)
    rows = rows_of(vocab_size, [1.0] * count, [300] * count, [0.9] * count, [0.0] * count)
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(ops.plan_sampling(rows).run(logits, uniform).tolist())
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


def test_tensors_that_do_not_fit_are_refused(ops: Ops) -> None:
    if not isinstance(ops, NativeOps):
        pytest.skip("torch checks its own")
    plan = ops.plan_sampling(rows_of(40, [1.0] * 2, [40] * 2, [1.0] * 2, [0.0] * 2))
    uniform = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"give contiguous torch\.float32 \[2, 40\]"):
        plan.run(torch.zeros(2, 41), uniform)
    with pytest.raises(ValueError, match=r"with strides \[1, 2\]"):
        plan.run(torch.zeros(40, 2).T, uniform)
    with pytest.raises(ValueError, match=r"give contiguous torch\.float64 \[2\]"):
        plan.run(torch.zeros(2, 40), uniform.float())
    with pytest.raises(ValueError, match="num_top is 41"):
        ops.logprobs(torch.zeros(2, 40), torch.tensor([0]), torch.tensor([0]), 41)
