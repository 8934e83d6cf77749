"""How the drafts of a step, and what a draft model reads, are shared out among its rows."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from draft_costs import linear_costs

from pagewire.decode_worker.drafting import Drafting, Speculation
from pagewire.engine.sampling_params import SamplingParams

COSTS = linear_costs(0.01)
GREEDY = SamplingParams(max_tokens=100)
REPEATED = (1, 2, 3, 1, 2, 3, 1, 2)


def lookup(max_draft_tokens: int = 64) -> Speculation:
    return Speculation(max_draft_tokens=max_draft_tokens, costs=COSTS)


def by_model(max_unseen_tokens: int = 64) -> Speculation:
    return Speculation(
        max_draft_tokens=64,
        costs=COSTS,
        draft_model_len=1000,
        max_unseen_tokens=max_unseen_tokens,
    )


def drafting(speculation: Speculation, token_ids: Sequence[int]) -> Drafting:
    found = speculation.drafting(token_ids, GREEDY)
    assert found is not None
    return found


def test_drafts_of_a_step_are_shared_out_evenly() -> None:
    speculation = lookup(max_draft_tokens=4)
    rows = [drafting(speculation, REPEATED) for _ in range(2)]
    speculation.plan(rows, [100, 100])
    assert [row.token_ids for row in rows] == [(3, 1), (3, 1)]


def test_drafts_never_reach_the_last_token() -> None:
    speculation = lookup()
    row = drafting(speculation, REPEATED)
    for num_left, num_drafts in ((1, 0), (2, 1), (3, 2)):
        speculation.plan([row], [num_left])
        assert row.num_drafts == num_drafts


def test_a_step_leaves_no_draft_behind() -> None:
    speculation = lookup()
    row = drafting(speculation, REPEATED)
    speculation.plan([row], [100])
    row.on_step(0)
    assert (row.token_ids, row.num_drafts) == ((), 0)


@pytest.mark.parametrize("speculation", [lookup(), by_model()])
def test_nothing_is_drafted_under_penalties(speculation: Speculation) -> None:
    sampling = SamplingParams(max_tokens=100, presence_penalty=0.5)
    assert speculation.drafting(REPEATED, sampling) is None
    speculation.plan([None], [100])


def test_prompts_are_read_within_a_budget_and_nobody_starves() -> None:
    speculation = by_model(max_unseen_tokens=10)
    rows = [drafting(speculation, range(length)) for length in (14, 3, 1)]
    shares = []
    for _ in range(3):
        speculation.plan(rows, [100] * 3)
        shares.append([(row.num_unseen, row.num_drafts > 0) for row in rows])
        for row in rows:
            row.on_step(0)
            row.extend(5)
    assert shares == [
        [(10, False), (2, False), (1, True)],
        [(5, True), (2, True), (1, True)],
        [(1, True), (1, True), (1, True)],
    ]


def test_drafts_are_looked_up_where_that_promises_more() -> None:
    speculation = replace(by_model(), costs=linear_costs(0.01, per_draft=0.3))
    copying = drafting(speculation, REPEATED)
    speculation.plan([copying], [100])
    assert copying.token_ids and copying.work is None
    novel = drafting(speculation, range(8))
    speculation.plan([novel], [100])
    assert novel.work is not None and not novel.token_ids


def test_a_model_drafts_where_what_is_looked_up_is_wrong() -> None:
    speculation = replace(by_model(), costs=linear_costs(0.01, per_draft=0.3))
    row = drafting(speculation, REPEATED)
    sources = []
    for token in (1, 2, 3) * 8:  # what is looked up is never taken, what the model says always
        speculation.plan([row], [100])
        sources.append("model" if row.work else "lookup")
        row.on_step(row.num_drafts if row.work else 0)
        row.extend(token)
    assert sources[0] == "lookup"
    assert sources.count("model") > 15


def test_what_was_looked_up_and_right_is_unseen_by_the_model() -> None:
    speculation = replace(by_model(), costs=linear_costs(0.01, per_draft=0.3))
    row = drafting(speculation, [7, *range(10, 18)])
    speculation.plan([row], [100])
    made = row.num_drafts
    row.on_step(made)
    for token in (*[50] * (made - 1), 10, 11, 12, 13, 14):  # the lookup continues with 15
        row.extend(token)
    speculation.plan([row], [100])
    assert row.token_ids[:2] == (15, 16)
    row.on_step(2)
    for token in (15, 16, 90):
        row.extend(token)
    speculation.plan([row], [100])
    assert row.work is not None
    assert (list(row.work.token_ids), row.work.start) == ([*range(10, 17), 90], 8 + made)


def test_the_work_for_a_draft_model_starts_where_it_left_off() -> None:
    speculation = by_model()
    row = drafting(speculation, range(10))
    speculation.plan([row], [100])
    assert row.work is not None
    assert (list(row.work.token_ids), row.work.start) == (list(range(10)), 0)
    drafts = row.num_drafts
    row.on_step(drafts)
    for token in range(drafts + 1):
        row.extend(token)
    speculation.plan([row], [100])
    assert row.work is not None
    assert (list(row.work.token_ids), row.work.start) == ([drafts - 1, drafts], 9 + drafts)
