"""Chunks of a prefill step: whole pages, within the budget, the most urgent first."""

from collections.abc import Sequence
from itertools import count

import pytest
from handoff_pair import LAYOUT, route
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.engine.page_pool import PagePool
from pagewire.engine.prefix_cache import PrefixCache
from pagewire.engine.sampling_params import SamplingParams
from pagewire.kv_transfer.messages import HandoffId
from pagewire.prefill_worker.scheduler import PrefillScheduler
from pagewire.prefill_worker.sender import Sender
from pagewire.prefill_worker.sequence import PrefillSequence
from pagewire.proto.page_hash import KEY_BYTES, PageHasher
from pagewire.worker.identity import AttemptKey

PAGE_SIZE = LAYOUT.page_size
HASHER = PageHasher(secret=bytes(KEY_BYTES), page_size=PAGE_SIZE)


def sequence(
    name: str,
    num_tokens: int,
    *,
    arrived: float = 0.0,
    deadline: float = 600.0,
    priority: int = 0,
    prompt: Sequence[int] | None = None,
) -> PrefillSequence:
    """With a `prompt`, one whose pages the prefix cache may share."""
    identity = HandoffId(request_id=name, attempt=1, sender=b"p" * 16, receiver=b"d" * 16)
    return PrefillSequence(
        key=AttemptKey(name, 1),
        route=route(b"p" * 16, name),
        token_ids=(1,) * num_tokens if prompt is None else tuple(prompt),
        page_keys=() if prompt is None else HASHER.keys(prompt),
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
        arrived=arrived,
        submitted=arrived,
        deadline=deadline,
        priority=priority,
    )


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=12),
    budget=st.integers(PAGE_SIZE, 96),
    num_pages=st.integers(7, 20),
    num_kept=st.integers(0, 2),
    pace=st.sampled_from([0.0, 0.5, 10.0]),
)
def test_everything_runs_within_its_limits(
    lengths: list[int], budget: int, num_pages: int, num_kept: int, pace: float
) -> None:
    pool = PagePool(num_pages)
    scheduler = PrefillScheduler(PrefixCache(pool), LAYOUT, budget)
    waiting = [sequence(str(index), length) for index, length in enumerate(lengths)]
    for item in waiting:
        scheduler.add(item)
    computed: list[PrefillSequence] = []  # whose pages still wait to be sent
    finished: list[PrefillSequence] = []
    for step in count():
        assert scheduler.num_queued_tokens == sum(item.num_remaining for item in waiting)
        if len(finished) == len(waiting):
            break
        chunks = scheduler.schedule(step * pace)
        assert chunks or computed
        assert sum(chunk.num_tokens for chunk in chunks) <= budget
        for chunk in chunks:
            assert len(chunk.sequence.pages) == LAYOUT.num_pages(len(chunk.sequence.token_ids))
            chunk.sequence.num_computed += chunk.num_tokens
            if chunk.sequence.num_remaining:
                assert chunk.sequence.num_computed % PAGE_SIZE == 0
            else:
                finished.append(chunk.sequence)
                computed.append(chunk.sequence)
        while len(computed) > (num_kept if chunks else 0):
            pool.release(computed.pop(0).pages)
        pool.check_integrity()
    assert scheduler.num_queued == 0


@settings(max_examples=200, deadline=None)
@given(
    before=st.lists(st.integers(1, 100), max_size=4),
    length=st.integers(1, 100),
    after=st.lists(
        st.lists(st.tuples(st.integers(1, 100), st.integers(-100, 100)), max_size=3),
        min_size=1,
        max_size=8,
    ),
    budget=st.integers(2 * PAGE_SIZE, 96),
)
def test_nobody_starves(
    before: list[int], length: int, after: list[list[tuple[int, int]]], budget: int
) -> None:
    """Once it has aged, a sequence waits only for the work of those that came before it.

    A step a second; more urgent sequences arrive with every step, for ever. A step may leave less
    than a page of its budget to others.
    """
    scheduler = PrefillScheduler(PrefixCache(PagePool(10_000)), LAYOUT, budget, ageing_s=3.0)
    for index, tokens in enumerate(before):
        scheduler.add(sequence(f"before-{index}", tokens, arrived=-1.0))
    victim = sequence("victim", length, priority=100)
    scheduler.add(victim)
    num_steps = 3 + -(-(sum(before) + length) // (budget - PAGE_SIZE + 1))
    for step in range(num_steps):
        for index, (tokens, priority) in enumerate(after[step % len(after)]):
            name = f"after-{step}-{index}"
            scheduler.add(sequence(name, tokens, arrived=step + 0.5, priority=priority))
        for chunk in scheduler.schedule(float(step)):
            chunk.sequence.num_computed += chunk.num_tokens
    assert victim.num_remaining == 0


def names(scheduler: PrefillScheduler, now: float = 0.0) -> list[str]:
    return [chunk.sequence.key.request_id for chunk in scheduler.schedule(now)]


def test_the_order_is_priority_then_deadlines_at_risk_then_the_shortest() -> None:
    scheduler = PrefillScheduler(PrefixCache(PagePool(100)), LAYOUT, 1024, ageing_s=90.0)
    for item in (
        sequence("long", 50),
        sequence("short", 5),
        sequence("late", 60, deadline=55.0),
        sequence("later", 6, deadline=60.0),
        sequence("idle", 1, priority=1),
        sequence("urgent", 100, priority=-1),
    ):
        scheduler.add(item)
    assert names(scheduler, now=50.0) == ["urgent", "late", "later", "short", "long", "idle"]


def test_a_short_prompt_shares_the_step_of_a_long_one() -> None:
    scheduler = PrefillScheduler(PrefixCache(PagePool(100)), LAYOUT, 64)
    scheduler.add(sequence("long", 200))
    scheduler.add(sequence("short", 10))
    chunks = scheduler.schedule(0.0)
    assert [(chunk.sequence.key.request_id, chunk.num_tokens) for chunk in chunks] == [
        ("short", 10),
        ("long", 48),
    ]
    assert scheduler.num_queued == 1


def test_a_sequence_that_waits_for_pages_is_overtaken_until_it_has_aged() -> None:
    pool = PagePool(4)
    scheduler = PrefillScheduler(PrefixCache(pool), LAYOUT, 64, ageing_s=3.0)
    held = pool.allocate(2)
    scheduler.add(sequence("large", 3 * PAGE_SIZE))
    scheduler.add(sequence("early", 1, arrived=1.0))
    assert names(scheduler, now=2.9) == ["early"]
    scheduler.add(sequence("small", 1, arrived=2.95))
    assert names(scheduler, now=3.0) == []
    pool.release(held)
    assert names(scheduler, now=3.1) == ["large"]


def shared(name: str, prompt: Sequence[int], *, arrived: float = 0.0) -> PrefillSequence:
    return sequence(name, len(prompt), prompt=prompt, arrived=arrived)


def run_step(scheduler: PrefillScheduler, cache: PrefixCache) -> list[tuple[str, int]]:
    """The chunks of a step, whose pages are cached once it has run."""
    chunks = scheduler.schedule(0.0)
    for chunk in chunks:
        item = chunk.sequence
        item.num_computed += chunk.num_tokens
        keys = item.page_keys[: item.num_computed // PAGE_SIZE]
        cache.register(keys, item.pages[: len(keys)])
    return [(chunk.sequence.key.request_id, chunk.num_tokens) for chunk in chunks]


def test_a_prompt_that_others_are_computing_is_computed_once() -> None:
    cache = PrefixCache(PagePool(100))
    scheduler = PrefillScheduler(cache, LAYOUT, 4 * PAGE_SIZE)
    prompt = range(6 * PAGE_SIZE)
    scheduler.add(shared("first", prompt))
    scheduler.add(shared("second", [*prompt, 7]))
    scheduler.add(shared("other", [9] * PAGE_SIZE))
    assert run_step(scheduler, cache) == [("other", PAGE_SIZE), ("first", 3 * PAGE_SIZE)]
    assert run_step(scheduler, cache) == [("first", 3 * PAGE_SIZE)]
    assert run_step(scheduler, cache) == [("second", 1)]


def test_who_waits_for_the_pages_of_another_starts_when_that_one_has_gone() -> None:
    cache = PrefixCache(PagePool(100))
    scheduler = PrefillScheduler(cache, LAYOUT, 2 * PAGE_SIZE)
    prompt = range(4 * PAGE_SIZE)
    first = shared("first", prompt)
    scheduler.add(first)
    scheduler.add(shared("second", prompt))
    assert run_step(scheduler, cache) == [("first", 2 * PAGE_SIZE)]
    scheduler.remove(first)
    assert run_step(scheduler, cache) == [("second", 2 * PAGE_SIZE)]


def test_what_is_cached_does_not_make_a_prompt_long() -> None:
    cache = PrefixCache(PagePool(100))
    scheduler = PrefillScheduler(cache, LAYOUT, 8 * PAGE_SIZE)
    history = range(8 * PAGE_SIZE)
    scheduler.add(shared("history", history))
    run_step(scheduler, cache)
    scheduler.add(shared("new", [5] * 2 * PAGE_SIZE))
    scheduler.add(shared("next turn", [*history, 3, 4]))
    assert run_step(scheduler, cache) == [("next turn", 2), ("new", 2 * PAGE_SIZE)]


def test_a_removed_sequence_is_forgotten() -> None:
    scheduler = PrefillScheduler(PrefixCache(PagePool(4)), LAYOUT, 64)
    first, second = sequence("first", 5), sequence("second", 5)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.remove(first)
    scheduler.remove(first)
    assert names(scheduler) == ["second"]


def test_a_budget_below_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens is 15"):
        PrefillScheduler(PrefixCache(PagePool(4)), LAYOUT, PAGE_SIZE - 1)
