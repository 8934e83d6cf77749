"""DecodeCore: whom it lets wait, whom it refuses, what it holds for the attempt that follows."""

from collections.abc import Sequence

import pytest
from handoff_pair import (
    DECODE,
    HASHER,
    LAYOUT,
    PREFILL,
    ROUTER,
    TICKET,
    abort_command,
    attach_command,
    decode_core,
    page_frame,
    pass_time,
    sampling,
    stop_command,
)
from hypothesis import given
from hypothesis import strategies as st

from pagewire.decode_worker.core import DecodeCore
from pagewire.kv_transfer.messages import (
    Accepted,
    Frame,
    Grant,
    HandoffId,
    Message,
    Open,
    Refused,
    RefuseReason,
)
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.effects import Effect, Emit, Send
from pagewire.worker.identity import prefix_hash

PROMPT = list(range(40))  # 3 pages, of which 2 are full; a request takes no other
LEASE_S = 10.0
SUCCESSOR = b"q" * 16


def attach(
    core: DecodeCore,
    request_id: str,
    *,
    attempt: int = 1,
    prefill: bytes = PREFILL,
    held_attempt: int = 0,
    now: float = 0.0,
) -> list[Effect]:
    command = attach_command(
        PROMPT, request_id=request_id, attempt=attempt, params=sampling(max_tokens=8)
    )
    command.attach.prefill = prefill
    command.attach.held_attempt = held_attempt
    return core.on_command(command, now)


def take_over(core: DecodeCore, request_id: str, *, now: float = 0.0) -> None:
    """A second attempt, with another prefill worker, after the loss of the first one's."""
    attach(core, request_id, attempt=2, prefill=SUCCESSOR, held_attempt=1, now=now)


def opening(
    request_id: str, *, attempt: int = 1, prefill: bytes = PREFILL, age_s: float = 0.0
) -> Open:
    return Open(
        id=HandoffId(request_id=request_id, attempt=attempt, sender=prefill, receiver=DECODE),
        ticket=TICKET,
        num_prompt_tokens=len(PROMPT),
        layout=LAYOUT,
        prefix_hash=prefix_hash(PROMPT),
        age_ms=int(1000 * age_s),
    )


def open_handoff(
    core: DecodeCore,
    request_id: str,
    *,
    attempt: int = 1,
    prefill: bytes = PREFILL,
    age_s: float = 0.0,
    now: float = 0.0,
) -> list[Message]:
    """What the decode worker answers to Open, but for its credit."""
    message = opening(request_id, attempt=attempt, prefill=prefill, age_s=age_s)
    effects = core.on_message(prefill, message, now)
    return [message for message in sent(effects) if not isinstance(message, Grant)]


def begin(core: DecodeCore, request_id: str) -> list[Message]:
    attach(core, request_id)
    return open_handoff(core, request_id)


def sent(effects: Sequence[Effect]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def failures(effects: Sequence[Effect]) -> "list[pb.FailureCode.ValueType]":
    return [effect.event.failed.code for effect in effects if isinstance(effect, Emit)]


def accepted(effects: Sequence[Effect]) -> list[str]:
    return [message.id.request_id for message in sent(effects) if isinstance(message, Accepted)]


def receive(core: DecodeCore, request_id: str, seq: int) -> None:
    """One page of the prompt arrives and is verified."""
    item = frame(request_id, seq)
    core.place(PREFILL, item, LAYOUT.page_bytes)
    core.on_message(PREFILL, item, 0.0)
    core.on_scattered(item, True, 0.0)


def frame(request_id: str, page: int) -> Frame:
    return page_frame(page, request_id=request_id, prefix_hash=prefix_hash(PROMPT))


def full_core(max_waiting_handoffs: int = 16) -> DecodeCore:
    """It has room for one request, which it has promised to the first."""
    core = decode_core(
        num_pages=3, num_slots=3, hasher=HASHER, max_waiting_handoffs=max_waiting_handoffs
    )
    assert isinstance(begin(core, "first")[0], Accepted)
    return core


def check_nothing_is_left(core: DecodeCore) -> None:
    core.check_integrity()
    assert core.is_idle
    assert core.pool.num_available == core.pool.num_pages


# --- Who waits, and who is refused -------------------------------------------------------------


def test_as_many_wait_as_may_and_the_next_is_refused() -> None:
    core = full_core(max_waiting_handoffs=1)
    assert begin(core, "waiting") == []
    attach(core, "late")
    (refused,) = open_handoff(core, "late")
    assert isinstance(refused, Refused)
    assert refused.reason is RefuseReason.FULL
    effects = core.on_command(abort_command(DECODE, "first"), 0.0)
    assert accepted(effects) == ["waiting"]
    assert begin(core, "next") == []


def test_the_router_is_told_that_there_is_no_room() -> None:
    core = full_core(max_waiting_handoffs=1)
    begin(core, "waiting")
    attach(core, "late")
    effects = core.on_message(PREFILL, opening("late"), 0.0)
    assert failures(effects) == [pb.FAILURE_CODE_FULL]


def test_one_must_be_able_to_wait() -> None:
    with pytest.raises(ValueError, match="max_waiting is 0"):
        decode_core(max_waiting_handoffs=0)


def test_who_is_older_takes_the_place_of_the_youngest() -> None:
    """By the time that a router has had it, however late it comes here."""
    core = full_core(max_waiting_handoffs=2)
    for name, age_s in (("young", 1.0), ("old", 3.0)):
        attach(core, name)
        assert open_handoff(core, name, age_s=age_s) == []
    attach(core, "between")
    (refused,) = open_handoff(core, "between", age_s=2.0)
    assert isinstance(refused, Refused)
    assert (refused.id.request_id, refused.reason) == ("young", RefuseReason.FULL)
    assert accepted(core.on_command(abort_command(DECODE, "first"), 0.0)) == ["old"]
    assert accepted(core.on_command(abort_command(DECODE, "old"), 0.0)) == ["between"]


def test_age_counts_from_when_it_was_told() -> None:
    core = full_core()
    for name, age_s, now in (("first come", 0.0, 10.0), ("older", 5.0, 12.0), ("last", 0.0, 13.0)):
        attach(core, name, now=now)
        assert open_handoff(core, name, age_s=age_s, now=now) == []
    order = ["older", "first come", "last"]
    for before, name in zip(["first", *order], order, strict=False):
        assert accepted(core.on_command(abort_command(DECODE, before), 14.0)) == [name]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), max_size=30))
def test_nobody_who_waits_is_younger_than_one_who_was_refused(
    requests: list[tuple[int, int]],
) -> None:
    """Unless he came after it. So who is refused passes all that came since when he asks again."""
    core = full_core(max_waiting_handoffs=3)
    submitted: dict[str, float] = {}
    waiting: set[str] = set()
    now = 0.0
    for index, (pause, age_s) in enumerate(requests):
        now += pause
        name = f"request {index}"
        submitted[name] = now - age_s
        waiting.add(name)
        attach(core, name, now=now)
        for answer in open_handoff(core, name, age_s=age_s, now=now):
            assert isinstance(answer, Refused)
            waiting.remove(answer.id.request_id)
            youngest = submitted[answer.id.request_id]
            assert all(submitted[other] <= youngest for other in waiting)
        assert len(waiting) <= 3


def test_nobody_is_refused_for_whom_there_is_room() -> None:
    core = decode_core(num_pages=6, max_waiting_handoffs=1)
    for name in ("first", "second"):
        assert isinstance(begin(core, name)[0], Accepted)


# --- What a lost prefill worker leaves behind ----------------------------------------------------


@pytest.mark.parametrize("is_known_to_the_router_first", [False, True])
def test_the_next_attempt_finds_its_room_and_what_had_come(
    is_known_to_the_router_first: bool,
) -> None:
    core = full_core()
    begin(core, "waiting")
    receive(core, "first", 0)
    if is_known_to_the_router_first:
        take_over(core, "first")
        assert core.on_peer_lost(SUCCESSOR, 0.0) == []
        core.on_peer_lost(PREFILL, 0.0)
    else:
        assert pb.FAILURE_CODE_PEER_LOST in failures(core.on_peer_lost(PREFILL, 0.0))
        attach(core, "newcomer")
        assert open_handoff(core, "newcomer") == []
        take_over(core, "first")
    answer = open_handoff(core, "first", attempt=2, prefill=SUCCESSOR)
    (accepted,) = [message for message in answer if isinstance(message, Accepted)]
    assert (accepted.id.attempt, accepted.num_hit_pages) == (2, 1)
    core.check_integrity()


def test_nobody_is_admitted_while_the_room_is_held() -> None:
    core = full_core()
    core.on_peer_lost(PREFILL, 0.0)
    assert begin(core, "newcomer") == []
    assert core.pool.num_available == 0
    assert not core.is_idle
    take_over(core, "first")
    assert core.pool.num_available == 0


def test_a_page_in_which_a_frame_lands_is_not_promised_again() -> None:
    """The router knows of the loss first: the next attempt waits for the end of the connection."""
    core = full_core()
    core.place(PREFILL, frame("first", 0), LAYOUT.page_bytes)
    take_over(core, "first")
    assert open_handoff(core, "first", attempt=2, prefill=SUCCESSOR) == []
    assert core.pool.counts().quarantined == 1
    assert begin(core, "newcomer") == []
    assert accepted(core.on_peer_lost(PREFILL, 0.0)) == ["first"]
    core.check_integrity()


@pytest.mark.parametrize("ending", ["abort", "session", "lease"])
@pytest.mark.parametrize("is_taken_over", [False, True])
def test_what_is_held_goes_to_others_when_nobody_wants_it(ending: str, is_taken_over: bool) -> None:
    core = full_core()
    core.on_peer_lost(PREFILL, 0.0)
    core.tick(0.0)
    if is_taken_over:
        take_over(core, "first")
    assert pass_time(core, 0.25, LEASE_S) == []
    if ending == "abort":
        core.on_command(abort_command(DECODE, "first", 2 if is_taken_over else 1), LEASE_S)
    elif ending == "session":
        core.on_session_lost(ROUTER)
    else:
        core.tick(LEASE_S + 0.1)
    assert core.pool.num_available == 3
    assert isinstance(begin(core, "newcomer")[0], Accepted)
    core.on_command(abort_command(DECODE, "first", 2), 0.0)
    core.on_command(abort_command(DECODE, "newcomer"), 0.0)
    core.on_peer_lost(PREFILL, 0.0)
    check_nothing_is_left(core)


def test_an_attempt_that_finds_nothing_held_waits_like_all_others() -> None:
    core = full_core()
    begin(core, "waiting")
    take_over(core, "stranger")
    assert open_handoff(core, "stranger", attempt=2, prefill=SUCCESSOR) == []
    effects = core.on_command(abort_command(DECODE, "first"), 0.0)
    assert accepted(effects) == ["waiting"]


def test_an_attempt_does_not_take_over_from_itself() -> None:
    core = decode_core()
    attach(core, "first", attempt=2, held_attempt=2)
    (answer,) = open_handoff(core, "first", attempt=2)
    assert isinstance(answer, Accepted)


def test_another_router_can_neither_take_over_nor_give_back() -> None:
    core = full_core()
    core.on_peer_lost(PREFILL, 0.0)
    command = attach_command(PROMPT, request_id="first", attempt=2)
    command.attach.held_attempt = 1
    command.route.sender = b"s" * 16
    core.on_command(command, 0.0)
    abort = abort_command(DECODE, "first")
    abort.route.sender = b"s" * 16
    core.on_command(abort, 0.0)
    core.on_session_lost(b"s" * 16)
    assert core.pool.num_available == 0
    take_over(core, "first")


def test_a_lease_does_not_run_while_the_process_stands_still() -> None:
    core = full_core()
    core.tick(0.0)
    core.on_peer_lost(PREFILL, 0.0)
    core.tick(60.0)
    assert core.pool.num_available == 0
    pass_time(core, 60.25, 60.0 + LEASE_S + 1.0)
    assert core.pool.num_available == 3


def test_a_stopped_choice_frees_its_part_when_the_room_is_promised_anew() -> None:
    core = decode_core(num_pages=8)
    command = attach_command(PROMPT, n=2, params=sampling(max_tokens=8))
    core.on_command(command, 0.0)
    open_handoff(core, "request")
    core.on_peer_lost(PREFILL, 0.0)
    before = core.pool.num_available
    command.route.attempt = 2
    command.attach.prefill, command.attach.held_attempt = SUCCESSOR, 1
    core.on_command(command, 0.0)
    assert core.pool.num_available == before
    stop = stop_command(1)
    stop.route.attempt = 2
    core.on_command(stop, 0.0)
    open_handoff(core, "request", attempt=2, prefill=SUCCESSOR)
    assert core.pool.num_available == before + 1
    core.check_integrity()
