"""Chunks of a prefill step: whole pages, within the budget, first come first served."""

import pytest
from handoff_pair import LAYOUT, route
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.engine.page_pool import PagePool
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kv_transfer.messages import HandoffId
from pagewire.prefill_worker.scheduler import PrefillScheduler
from pagewire.prefill_worker.sender import Sender
from pagewire.prefill_worker.sequence import PrefillSequence
from pagewire.worker.identity import AttemptKey

PAGE_SIZE = LAYOUT.page_size


def sequence(name: str, num_tokens: int) -> PrefillSequence:
    identity = HandoffId(request_id=name, attempt=1, sender=b"p" * 16, receiver=b"d" * 16)
    return PrefillSequence(
        key=AttemptKey(name, 1),
        route=route(b"p" * 16, name),
        token_ids=(1,) * num_tokens,
        sampling=SamplingParams(),
        sender=Sender(
            id=identity,
            ticket=b"t" * 16,
            prefix_hash=b"h" * 16,
            num_prompt_tokens=num_tokens,
            layout=LAYOUT,
            slot_bytes=LAYOUT.page_bytes,
        ),
        addresses=(),
    )


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=12),
    budget=st.integers(PAGE_SIZE, 96),
    num_pages=st.integers(7, 20),
    num_kept=st.integers(0, 2),
)
def test_everything_runs_in_order_within_its_limits(
    lengths: list[int], budget: int, num_pages: int, num_kept: int
) -> None:
    pool = PagePool(num_pages)
    scheduler = PrefillScheduler(pool, LAYOUT, budget)
    waiting = [sequence(str(index), length) for index, length in enumerate(lengths)]
    for item in waiting:
        scheduler.add(item)
    computed: list[PrefillSequence] = []  # whose pages still wait to be sent
    started: list[PrefillSequence] = []
    finished: list[PrefillSequence] = []
    while len(finished) < len(waiting):
        assert scheduler.num_queued_tokens == sum(item.num_remaining for item in waiting)
        chunks = scheduler.schedule()
        assert chunks or computed
        assert sum(chunk.num_tokens for chunk in chunks) <= budget
        for chunk in chunks:
            assert len(chunk.sequence.pages) == LAYOUT.num_pages(len(chunk.sequence.token_ids))
            if chunk.sequence not in started:
                started.append(chunk.sequence)
            chunk.sequence.num_computed += chunk.num_tokens
            if chunk.sequence.num_remaining:
                assert chunk is chunks[-1]
                assert chunk.sequence.num_computed % PAGE_SIZE == 0
            else:
                finished.append(chunk.sequence)
                computed.append(chunk.sequence)
        while len(computed) > (num_kept if chunks else 0):
            pool.release(computed.pop(0).pages)
        pool.check_integrity()
    assert started == waiting
    assert finished == waiting
    assert scheduler.num_queued == 0


def test_nobody_overtakes_a_sequence_that_waits_for_pages() -> None:
    pool = PagePool(4)
    scheduler = PrefillScheduler(pool, LAYOUT, 64)
    held = pool.allocate(2)
    large, small = sequence("large", 3 * PAGE_SIZE), sequence("small", 1)
    scheduler.add(large)
    scheduler.add(small)
    assert scheduler.schedule() == []
    pool.release(held)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [large, small]


def test_a_removed_sequence_is_forgotten() -> None:
    scheduler = PrefillScheduler(PagePool(4), LAYOUT, 64)
    first, second = sequence("first", 5), sequence("second", 5)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.remove(first)
    scheduler.remove(first)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [second]


def test_a_budget_below_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens is 15"):
        PrefillScheduler(PagePool(4), LAYOUT, PAGE_SIZE - 1)
