"""Several choices of a request on both workers: what they share, and what each of them holds."""

import pytest
from handoff_pair import (
    DECODE,
    HASHER,
    LAYOUT,
    PREFILL,
    TOKEN,
    HandoffPair,
    abort_command,
    attach_command,
    decode_core,
    prefill_command,
    prefill_core,
    sampling,
    stop_command,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.engine.batch import Batch, PageCopy, StepResult
from pagewire.kv_transfer.messages import Refused, RefuseReason, Seal
from pagewire.proto import worker_pb2 as pb
from pagewire.proto.choices import PageDemand
from pagewire.worker.identity import CommandError, read_work

PAGE = LAYOUT.page_size


def started(
    num_prompt_tokens: int, n: int, *, max_tokens: int = 3, num_pages: int = 64
) -> HandoffPair:
    """Both workers have their commands; nothing has happened."""
    pair = HandoffPair(prefill_core(), decode_core(num_pages=num_pages, max_batch_size=8))
    start(pair, "request", num_prompt_tokens, n, max_tokens)
    return pair


def start(
    pair: HandoffPair, request_id: str, num_prompt_tokens: int, n: int, max_tokens: int = 3
) -> None:
    prompt, params = [1] * num_prompt_tokens, sampling(max_tokens=max_tokens)
    attach = attach_command(prompt, request_id=request_id, params=params, n=n)
    pair.carry_out(pair.decode.on_command(attach, 0.0))
    prefill = prefill_command(prompt, request_id=request_id, params=params, n=n)
    pair.carry_out(pair.prefill.on_command(prefill, 0.0))


def hand_over(pair: HandoffPair, num_requests: int = 1) -> None:
    """Everything up to the next decode step."""
    while pair.event_names().count("ready") < num_requests:
        for step in pair.steps():
            if step != pair.step_decode:
                step()
    while pair.to_prefill:
        pair.deliver_to_prefill()


def next_batch(pair: HandoffPair) -> Batch:
    pair.step_decode()
    _, batch = pair.running_batches()
    assert batch is not None
    return batch


def num_used(pair: HandoffPair) -> int:
    counts = pair.decode.pool.counts()
    return counts.owned + counts.pinned


def test_the_last_page_is_copied_for_each_choice_but_one() -> None:
    pair = started(2 * PAGE + 8, 3)
    hand_over(pair)
    assert num_used(pair) == 2 + 3
    batch = next_batch(pair)
    tables = [list(row.page_table) for row in batch.rows]
    (first, *others) = tables
    assert all(table[:2] == first[:2] for table in others)
    assert batch.copies == tuple(PageCopy(first[2], table[2]) for table in others)
    assert len({table[2] for table in tables}) == 3
    assert pair.decode.pool.counts().pinned == 3
    pair.step_decode()
    assert pair.decode.pool.counts().pinned == 0
    assert next_batch(pair).copies == ()


def test_full_pages_need_no_copy() -> None:
    pair = started(2 * PAGE, 3)
    hand_over(pair)
    assert num_used(pair) == 2
    batch = next_batch(pair)
    assert batch.copies == ()
    assert num_used(pair) == 2 + 3


def test_token_0_of_every_choice_is_sampled_from_one_row() -> None:
    pair = started(8, 4)
    pair.step_prefill()
    batch, _ = pair.running_batches()
    assert batch is not None
    (row,) = batch.rows
    assert row.sampling is not None
    assert [row.sampling.seed, *(each.seed for each in row.siblings)] == [0, 1, 2, 3]
    pair.step_prefill()
    first_tokens = [event.first_token for event in pair.events if event.HasField("first_token")]
    assert [(item.choice, item.token_id) for item in first_tokens] == [
        (choice, TOKEN) for choice in range(4)
    ]


def test_a_choice_that_ends_gives_its_pages_and_its_promise_back() -> None:
    pair = started(2 * PAGE + 1, 2, max_tokens=3 * PAGE)
    hand_over(pair)
    pool = pair.decode.pool
    own = PageDemand(num_prompt_tokens=2 * PAGE + 1, max_tokens=3 * PAGE).num_pages(PAGE) - 2
    assert pool.num_available == pool.num_pages - 2 - 2 * own
    next_batch(pair)
    pair.step_decode()
    pair.carry_out(pair.decode.on_command(stop_command(1), 0.0))
    assert pool.num_available == pool.num_pages - 2 - own
    assert len(next_batch(pair).rows) == 1


def test_the_source_of_a_copy_stays_until_it_is_made() -> None:
    pair = started(PAGE + 1, 2)
    hand_over(pair)
    pair.carry_out(pair.decode.on_command(stop_command(0), 0.0))
    assert pair.decode.pool.counts().quarantined == 1
    batch = next_batch(pair)
    (copy,) = batch.copies
    (row,) = batch.rows
    assert row.page_table[1] == copy.destination
    pair.step_decode()
    assert pair.decode.pool.counts().quarantined == 0


def test_the_prompt_is_cached_once_and_a_hit_forks_like_a_hand_off() -> None:
    pair = HandoffPair(prefill_core(hasher=HASHER), decode_core(hasher=HASHER))
    for request_id in ("first", "second"):
        start(pair, request_id, 2 * PAGE + 8, 3, max_tokens=20)
        pair.run()
        counts = pair.decode.pool.counts()
        assert (counts.cached, counts.free) == (3, counts.total - 3)  # all say the same
    names = pair.event_names()
    assert (names.count("ready"), names.count("first_token")) == (2, 2 * 3)
    cached = [event.first_token.cached_tokens for event in pair.events if event.first_token.choice]
    assert cached == [0, 0, 2 * PAGE, 2 * PAGE]


def test_copies_that_nobody_waits_for_are_not_made() -> None:
    pair = started(PAGE + 1, 3)
    hand_over(pair)
    pair.carry_out(pair.decode.on_command(abort_command(DECODE), 0.0))
    assert pair.decode.pool.counts().quarantined == 3
    pair.run()
    pair.check_nothing_is_left()


def test_a_failed_step_fails_the_whole_request_and_copies_again_for_others() -> None:
    pair = HandoffPair(prefill_core(), decode_core(max_batch_size=8))
    start(pair, "first", PAGE + 1, 2)
    start(pair, "second", PAGE + 2, 2)
    hand_over(pair, num_requests=2)
    copies = next_batch(pair).copies
    assert len(copies) == 2
    pair.fail_decode_step(0)
    assert pair.failures() == [(DECODE, pb.FAILURE_CODE_INTERNAL)]
    batch = next_batch(pair)
    assert [row.request_id for row in batch.rows] == ["second", "second"]
    assert copies[1] in batch.copies
    pair.run()
    pair.check_nothing_is_left()


def test_choices_that_end_at_token_0_are_reported_and_never_run() -> None:
    pair = HandoffPair(prefill_core(), decode_core())
    params = sampling(max_tokens=3, stop_token_ids=[9])
    pair.carry_out(pair.decode.on_command(attach_command([1] * 20, params=params, n=3), 0.0))
    pair.carry_out(pair.prefill.on_command(prefill_command([1] * 20, params=params, n=3), 0.0))
    pair.sample = lambda batch: StepResult(
        tokens=tuple((7, 9, 7)[: row.num_samples] for row in batch.rows)
    )
    hand_over(pair)
    (tokens,) = [event.tokens for event in pair.events if event.HasField("tokens")]
    assert (tokens.choice, tokens.position, list(tokens.token_ids)) == (1, 0, [9])
    assert tokens.finish_reason == pb.FINISH_REASON_STOP
    assert len(next_batch(pair).rows) == 2
    pair.run()
    pair.check_nothing_is_left()


@pytest.mark.parametrize("first_tokens", [(), (7,), (7, 7, 7), (7, 100)])
def test_a_seal_without_token_0_of_every_choice_is_refused(first_tokens: tuple[int, ...]) -> None:
    pair = started(20, 2)
    pair.step_prefill()
    pair.deliver_to_decode()
    seal = Seal(id=pair.to_prefill[0].id.reply(), num_frames=0, digest=0, first_tokens=first_tokens)
    pair.carry_out(pair.decode.on_message(PREFILL, seal, 0.0))
    assert pair.failures() == [(DECODE, pb.FAILURE_CODE_INTEGRITY)]


def test_a_choice_can_be_stopped_before_it_runs() -> None:
    pair = started(PAGE + 1, 3)
    pair.carry_out(pair.decode.on_command(stop_command(1), 0.0))
    hand_over(pair)
    assert num_used(pair) == 1 + 2
    pair.run()
    tokens = [event.tokens for event in pair.events if event.HasField("tokens")]
    assert {item.choice for item in tokens} == {0, 2}
    pair.check_nothing_is_left()


def test_to_stop_the_last_choice_is_to_abort() -> None:
    pair = started(40, 2)
    pair.step_prefill()
    pair.deliver_to_decode()
    for choice in (0, 1, 1):
        pair.carry_out(pair.decode.on_command(stop_command(choice), 0.0))
    refusals = [item for item in pair.to_prefill if isinstance(item, Refused)]
    assert [item.reason for item in refusals] == [RefuseReason.ABORTED]
    pair.run()
    pair.abort()
    pair.check_nothing_is_left()


def test_what_stops_nothing() -> None:
    pair = started(20, 2)
    foreign = stop_command(0)
    foreign.route.sender = b"x" * 16
    unknown = stop_command(0, "other")
    for command in (stop_command(5), foreign, unknown):
        assert pair.decode.on_command(command, 0.0) == []
    hand_over(pair)
    assert len(next_batch(pair).rows) == 2


@pytest.mark.parametrize("n", [0, 17])
def test_the_number_of_choices_is_checked_again(n: int) -> None:
    body = attach_command([1], n=n).attach
    with pytest.raises(CommandError, match=f"n is {n}; it must be 1 to 16"):
        read_work(body, vocab_size=100, max_model_len=50)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_in_whatever_order_all_pages_come_back(data: st.DataObject) -> None:
    """Requests of all shapes, whose steps fail, whose choices are stopped and who are aborted."""
    pair = HandoffPair(prefill_core(num_pages=32), decode_core(num_pages=24, max_batch_size=3))
    names = [f"request-{index}" for index in range(data.draw(st.integers(1, 3)))]
    for name in names:
        num_prompt_tokens = data.draw(st.sampled_from([1, 15, 16, 17, 32, 40]))
        n, max_tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
        start(pair, name, num_prompt_tokens, n, max_tokens)
    for action in data.draw(st.lists(st.integers(0, 24), max_size=80)):
        name = names[action % len(names)]
        steps = pair.steps()
        if action == 24:
            for end, core in ((PREFILL, pair.prefill), (DECODE, pair.decode)):
                pair.carry_out(core.on_command(abort_command(end, name), 0.0))
        elif action >= 21:
            pair.carry_out(pair.decode.on_command(stop_command(action - 21, name), 0.0))
        elif action == 20 and pair.running_batches()[1] is not None:
            pair.fail_decode_step(0)
        else:
            steps[action % len(steps)]()
        pair.prefill.check_integrity()
        pair.decode.check_integrity()
    pair.run()
    for name in names:  # as the router does for whatever has failed or was aborted on one side
        for end, core in ((PREFILL, pair.prefill), (DECODE, pair.decode)):
            pair.carry_out(core.on_command(abort_command(end, name), 0.0))
    pair.run()
    pair.check_nothing_is_left()
