"""Decode steps scheduled before the tokens of the one before are known: DecodeCore's part."""

import pytest
from handoff_pair import (
    DECODE,
    HandoffPair,
    abort_command,
    attach_command,
    decode_core,
    prefill_command,
    prefill_core,
    sampling,
    step_result,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.decode_worker.page_copies import PageCopies
from pagewire.engine.batch import Batch, StepResult
from pagewire.engine.page_pool import PageState
from pagewire.proto import worker_pb2 as pb

PROMPT = list(range(30))  # 2 pages, of which the second has room for 2 tokens
MAX_TOKENS = 7
STOP = 34  # what is sampled behind position 33, as the fifth token
Choices = st.lists(st.integers(0, 7), max_size=60)
FewChoices = st.lists(st.integers(0, 7), max_size=10)  # with a step that is out already


def sample(batch: Batch) -> StepResult:
    """Tokens that say at which position the one before them stands."""
    ends = (row.start + len(row.token_ids) for row in batch.rows)
    return StepResult(
        tokens=tuple(
            (end,) if row.sampling else () for row, end in zip(batch.rows, ends, strict=True)
        )
    )


def started(
    *, stop: bool = False, max_tokens: int = MAX_TOKENS, n: int | None = None
) -> HandoffPair:
    pair = HandoffPair(prefill_core(), decode_core())
    pair.sample, pair.runs_ahead = sample, True
    params = sampling(max_tokens, [STOP] if stop else [])
    pair.carry_out(pair.decode.on_command(attach_command(PROMPT, params=params, n=n), 0.0))
    pair.carry_out(pair.prefill.on_command(prefill_command(PROMPT, params=params, n=n), 0.0))
    return pair


def decoding(pair: HandoffPair, num_batches: int = 1) -> HandoffPair:
    """Up to where so many decode steps are out."""
    while not pair.decode_batches():
        for step in pair.steps():
            if step != pair.begin_decode_ahead:
                step()
    if num_batches > 1:
        pair.begin_decode_ahead()
    assert len(pair.decode_batches()) == num_batches
    return pair


def check_pages(pair: HandoffPair) -> None:
    """Nobody else gets a page that a step which is out reads or writes."""
    in_use = {
        page for batch in pair.decode_batches() for row in batch.rows for page in row.page_table
    }
    states = {pair.decode.pool.state(page) for page in in_use}
    assert not states & {PageState.FREE, PageState.CACHED}


def play(pair: HandoffPair, choices: list[int]) -> None:
    for choice in choices:
        steps = pair.steps()
        steps[choice % len(steps)]()
        pair.decode.check_integrity()
        check_pages(pair)


def output(pair: HandoffPair) -> list[int]:
    tokens = [event.tokens for event in pair.events if event.HasField("tokens")]
    return [token for item in tokens for token in item.token_ids]


@settings(max_examples=100)
@given(choices=Choices, stop=st.booleans())
def test_the_output_is_that_of_steps_one_after_another(choices: list[int], stop: bool) -> None:
    pair = decoding(started(stop=stop))
    play(pair, choices)
    pair.run()
    assert output(pair) == list(range(30, STOP + 1 if stop else 37))
    assert pair.decode.state().generated_tokens == len(output(pair)) - 1
    pair.check_nothing_is_left()


@settings(max_examples=150)
@given(before=FewChoices, between=FewChoices, stop=st.booleans())
def test_pages_outlive_an_abort_until_both_steps_are_over(
    before: list[int], between: list[int], stop: bool
) -> None:
    pair = decoding(started(stop=stop))
    play(pair, before)
    pair.carry_out(pair.decode.on_command(abort_command(DECODE), 0.0))
    check_pages(pair)
    play(pair, between)
    pair.abort()
    pair.check_nothing_is_left()


@settings(max_examples=100)
@given(before=Choices, data=st.data())
def test_a_step_that_fails_takes_the_one_behind_it_along(
    before: list[int], data: st.DataObject
) -> None:
    pair = decoding(started(), num_batches=data.draw(st.integers(1, 2)))
    if data.draw(st.booleans()):
        pair.carry_out(pair.decode.on_command(abort_command(DECODE), 0.0))
        pair.fail_decode_step(0)
    else:
        pair.fail_decode_step(0)
        assert pair.failures()[-1] == (DECODE, pb.FAILURE_CODE_INTERNAL)
    play(pair, before)
    pair.abort()
    pair.check_nothing_is_left()


def test_a_dropped_step_runs_again_with_known_tokens() -> None:
    pair = decoding(started(), num_batches=2)
    running, ahead = pair.decode_batches()
    assert [row.follows for row in ahead.rows] == [0]
    assert ahead.rows[0].start == running.rows[0].start + 1
    pair.decode.drop_batch_ahead()
    pair.carry_out(pair.decode.on_batch_done(sample(running), 0.0))
    again, _ = pair.decode.next_batch(0.0)
    assert again is not None
    (row,) = again.rows
    assert (row.follows, row.start, list(row.token_ids)) == (None, ahead.rows[0].start, [31])
    assert row.output_position == ahead.rows[0].output_position


def test_pages_of_a_dropped_step_are_those_of_the_step_that_still_runs() -> None:
    pair = decoding(started(), num_batches=2)
    pair.carry_out(pair.decode.on_command(abort_command(DECODE), 0.0))
    pair.decode.drop_batch_ahead()
    check_pages(pair)
    pair.decode.on_batch_done(step_result(pair.decode_batches()[0]), 0.0)
    assert pair.decode.pool.counts().quarantined == 0


def test_nothing_runs_behind_a_last_token() -> None:
    pair = decoding(started(max_tokens=2))
    assert pair.decode.next_batch_ahead(0.0) is None


def test_a_step_waits_for_pages_that_are_to_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = decoding(started())
    monkeypatch.setattr(PageCopies, "are_waiting", True)
    assert pair.decode.next_batch_ahead(0.0) is None


@settings(max_examples=50)
@given(choices=Choices)
def test_choices_of_one_prompt_go_ahead_together(choices: list[int]) -> None:
    pair = started(n=2)
    pair.sample = lambda batch: (
        sample(batch) if all(not row.siblings for row in batch.rows) else step_result(batch, 30)
    )
    play(pair, choices)
    pair.run()
    assert sorted(output(pair)) == sorted(2 * list(range(30, 37)))
    pair.check_nothing_is_left()
