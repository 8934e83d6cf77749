"""As many drafts as pay, and none for sequences on which they do not."""

import random

import pytest
from draft_costs import linear_costs
from hypothesis import given
from hypothesis import strategies as st

from pagewire.engine.draft_length import (
    LOOKUP_CHANCES,
    MAX_DRAFTS,
    MODEL_CHANCES,
    DraftCosts,
    DraftLength,
)

LOOKUP = linear_costs(0.05)
MODEL = linear_costs(0.05, per_draft=0.3)
STRONG = 9  # tokens that match before what is looked up
WEAK = 2


def lookup(costs: DraftCosts = LOOKUP) -> DraftLength:
    return DraftLength(costs, LOOKUP_CHANCES)


def length_of(length: DraftLength, *, num_rows: int = 1, num_matched: int = STRONG) -> int:
    return length.choose(MAX_DRAFTS, num_rows=num_rows, num_matched=num_matched).length


def run(length: DraftLength, costs: DraftCosts, chance: float, *, num_rows: int = 1) -> float:
    """Tokens per cost of a sequence whose drafts are right with `chance`, over no drafts at all."""
    source = random.Random(1)
    produced, cost = 0, 0.0
    while produced < 1000:
        drafted = length_of(length, num_rows=num_rows)
        right = 0
        while right < drafted and source.random() < chance:
            right += 1
        length.on_step(num_drafted=drafted, num_accepted=right)
        produced += right + 1
        cost += 1 + costs.of_drafts(drafted, num_rows)
    return produced / cost


def right_in_full(length: DraftLength, num_steps: int) -> None:
    for _ in range(num_steps):
        drafted = length_of(length)
        length.on_step(num_drafted=drafted, num_accepted=drafted)


def wrong_until_none(length: DraftLength) -> list[int]:
    """How long the drafts of each step were."""
    lengths = []
    while drafted := length_of(length):
        length.on_step(num_drafted=drafted, num_accepted=0)
        lengths.append(drafted)
    return lengths


def test_drafts_begin_short_and_grow_to_the_longest() -> None:
    length = lookup()
    first = length_of(length, num_matched=5)
    right_in_full(length, 20)
    assert 0 < first < length_of(length) == MAX_DRAFTS


def test_wrong_drafts_get_shorter_and_end() -> None:
    length = lookup()
    right_in_full(length, 20)
    lengths = wrong_until_none(length)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[3] < MAX_DRAFTS / 2


def test_drafting_begins_again_after_a_while() -> None:
    length = lookup()
    wrong_until_none(length)
    for _ in range(200):
        length.on_step(num_drafted=0, num_accepted=0)
    assert length_of(length) > 0


def test_a_weak_match_has_fewer_drafts_than_a_strong_one() -> None:
    costs = linear_costs(0.2)
    assert length_of(lookup(costs), num_matched=WEAK) < length_of(lookup(costs))
    assert length_of(lookup(costs), num_matched=WEAK, num_rows=8) == 0


def test_drafts_of_weak_matches_that_are_right_are_made_more_often() -> None:
    length = lookup(linear_costs(0.5))
    assert length_of(length, num_matched=WEAK) == 0
    right_in_full(length, 5)
    for _ in range(5):
        length.choose(1, num_rows=1, num_matched=WEAK + 2)
        length.on_step(num_drafted=1, num_accepted=1)
    assert length_of(length, num_matched=WEAK) > 0


@given(
    per_token=st.floats(0.001, 0.5),
    per_draft=st.sampled_from([0.0, 0.1, 0.5]),
    steps=st.lists(
        st.tuples(st.integers(0, 16), st.integers(1, 32), st.integers(0, 16), st.integers(0, 16)),
        max_size=300,
    ),
)
def test_drafts_take_no_more_than_their_credit_whatever_becomes_of_them(
    per_token: float, per_draft: float, steps: list[tuple[int, int, int, int]]
) -> None:
    costs = linear_costs(per_token, per_draft=per_draft)
    length = lookup(costs)
    num_tokens, duration = 0, 0.0
    for limit, num_rows, num_matched, fate in steps:
        drafted = length.choose(limit, num_rows=num_rows, num_matched=num_matched).length
        assert drafted <= limit
        right = min(fate, drafted)
        length.on_step(num_drafted=drafted, num_accepted=right)
        num_tokens += right + 1
        duration += 1 + costs.of_drafts(drafted, num_rows)
    assert duration <= 1.01 * num_tokens + 1 + 1e-6


@pytest.mark.parametrize("chance", [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.98])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("chances", [LOOKUP_CHANCES, MODEL_CHANCES])
def test_whatever_the_chance_drafting_does_not_lose(
    chances: tuple[float, ...], num_rows: int, chance: float
) -> None:
    costs = LOOKUP if chances is LOOKUP_CHANCES else MODEL
    assert run(DraftLength(costs, chances), costs, chance, num_rows=num_rows) > 0.985


def test_drafting_gains_where_drafts_are_right() -> None:
    assert run(lookup(), LOOKUP, 0.9) > 3.5
    assert run(DraftLength(MODEL, MODEL_CHANCES), MODEL, 0.9) > 1.6


def test_a_draft_model_that_costs_as_much_as_the_model_does_not_draft() -> None:
    costs = linear_costs(0.05, per_draft=1.0)
    assert length_of(DraftLength(costs, MODEL_CHANCES)) == 0


def test_more_rows_leave_room_for_fewer_drafts() -> None:
    lengths = [length_of(lookup(), num_rows=rows) for rows in (1, 8, 64)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def test_a_limit_is_kept() -> None:
    assert lookup().choose(0, num_rows=1, num_matched=STRONG).length == 0
    assert lookup().choose(1, num_rows=1, num_matched=STRONG).length == 1


def test_costs_lie_on_lines_through_the_measured_steps() -> None:
    costs = DraftCosts(steps=((1, 2.0), (2, 3.0), (4, 3.0), (8, 5.0)))
    assert costs.of_drafts(0, 4) == 0
    assert costs.of_drafts(1, 1) == pytest.approx(0.5)
    assert costs.of_drafts(2, 1) == pytest.approx(0.5)
    assert costs.of_drafts(2, 2) == pytest.approx(4.0 / 3 - 1)
    assert costs.of_drafts(1, 8) == pytest.approx(9.0 / 5 - 1)  # beyond the longest
    with pytest.raises(ValueError, match="steps has 1"):
        DraftCosts(steps=((1, 1.0),))


def test_a_step_that_seems_shorter_with_drafts_costs_nothing() -> None:
    assert DraftCosts(steps=((1, 2.0), (2, 1.9))).of_drafts(1, 1) == 0
