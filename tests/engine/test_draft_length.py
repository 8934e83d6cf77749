"""As many drafts as pay, and none for sequences on which they do not."""

import random

import pytest

from pagewire.engine.draft_length import MAX_DRAFTS, DraftCosts, DraftLength

LOOKUP = DraftCosts(per_token=0.05)
MODEL = DraftCosts(per_token=0.05, per_draft=0.3)


def run(costs: DraftCosts, chance: float, *, num_rows: int = 1, num_tokens: int = 4000) -> float:
    """Tokens per cost of a sequence whose drafts are right with `chance`, over no drafts at all."""
    source = random.Random(1)
    length = DraftLength(costs)
    produced, cost = 0, 0.0
    while produced < num_tokens:
        drafted = length.choose(MAX_DRAFTS, num_rows=num_rows).length
        right = 0
        while right < drafted and source.random() < chance:
            right += 1
        length.on_step(num_drafted=drafted, num_accepted=right)
        produced += right + 1
        cost += 1 + drafted * costs.of_draft(num_rows)
    return produced / cost


def right_in_full(length: DraftLength, num_steps: int) -> None:
    for _ in range(num_steps):
        drafted = length.choose(MAX_DRAFTS, num_rows=1).length
        length.on_step(num_drafted=drafted, num_accepted=drafted)


def wrong_until_a_pause(length: DraftLength) -> int:
    """How many drafts it took."""
    num_drafts = 0
    while drafted := length.choose(MAX_DRAFTS, num_rows=1).length:
        length.on_step(num_drafted=drafted, num_accepted=0)
        num_drafts += drafted
    return num_drafts


@pytest.mark.parametrize("costs", [LOOKUP, MODEL])
def test_right_drafts_grow_to_the_longest(costs: DraftCosts) -> None:
    length = DraftLength(costs)
    first = length.choose(MAX_DRAFTS, num_rows=1).length
    right_in_full(length, 20)
    assert 0 < first < length.choose(MAX_DRAFTS, num_rows=1).length
    if costs is LOOKUP:
        assert length.choose(MAX_DRAFTS, num_rows=1).length == MAX_DRAFTS


def test_wrong_drafts_end_soon() -> None:
    length = DraftLength(LOOKUP)
    right_in_full(length, 20)
    assert wrong_until_a_pause(length) < 4 * MAX_DRAFTS


def test_drafting_begins_again_after_a_pause_without_prejudice() -> None:
    length = DraftLength(LOOKUP)
    first = length.choose(MAX_DRAFTS, num_rows=1).length
    wrong_until_a_pause(length)
    num_steps = 0
    while not length.choose(MAX_DRAFTS, num_rows=1).length:
        length.on_step(num_drafted=0, num_accepted=0)
        num_steps += 1
    assert num_steps == 16
    assert length.choose(MAX_DRAFTS, num_rows=1).length == first


@pytest.mark.parametrize("costs", [LOOKUP, MODEL])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_drafts_that_are_never_right_cost_next_to_nothing(costs: DraftCosts, num_rows: int) -> None:
    assert run(costs, 0.0, num_rows=num_rows) > 0.98


@pytest.mark.parametrize("chance", [0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.98])
@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("costs", [LOOKUP, MODEL])
def test_whatever_the_chance_drafting_does_not_lose(
    costs: DraftCosts, num_rows: int, chance: float
) -> None:
    assert run(costs, chance, num_rows=num_rows) > 0.97


def test_drafting_gains_where_drafts_are_right() -> None:
    assert run(LOOKUP, 0.9) > 3.5
    assert run(MODEL, 0.9) > 1.6


def test_a_draft_model_that_costs_as_much_as_the_model_does_not_draft() -> None:
    length = DraftLength(DraftCosts(per_token=0.05, per_draft=1.0))
    assert length.choose(MAX_DRAFTS, num_rows=1).length == 0


def test_more_rows_leave_room_for_fewer_drafts() -> None:
    lengths = [DraftLength(LOOKUP).choose(MAX_DRAFTS, num_rows=rows).length for rows in (1, 8, 64)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def test_a_limit_is_kept_and_is_no_reason_to_pause() -> None:
    length = DraftLength(LOOKUP)
    assert length.choose(0, num_rows=1).length == 0
    assert length.choose(1, num_rows=1).length == 1
