"""DispatchCore: its queue, its projections, its deadlines, and workers that come and go."""

from collections.abc import Sequence
from itertools import count

import pytest
from routing import (
    PAGE_SIZE,
    ROUTER,
    attached,
    failed,
    first_token,
    heartbeat,
    make_request,
    parked_event,
    ready,
    registration,
    tokens,
)

from pagewire.proto import worker_pb2 as pb
from pagewire.proto.page_hash import KEY_BYTES, PageHasher
from pagewire.router.dispatch import DispatchCore
from pagewire.router.lifecycle import Deliver, Effect, Fail, SendCommand
from pagewire.router.members import RegistrationRefused
from pagewire.router.request import RequestFailed

P = registration("prefill-0", pb.ROLE_PREFILL)
D = registration("decode-0", pb.ROLE_DECODE)


def make_core(max_queued: int = 2, page_secret: bytes | None = None) -> DispatchCore:
    tickets = count()
    return DispatchCore(
        incarnation=ROUTER,
        max_queued=max_queued,
        make_ticket=lambda: next(tickets).to_bytes(16, "big"),
        page_secret=page_secret,
    )


def running_core(max_queued: int = 2) -> DispatchCore:
    """A core with one prefill worker and one decode worker of 10 pages."""
    core = make_core(max_queued)
    core.on_registered(P, 0.0)
    core.on_registered(D, 0.0)
    return core


def commands(effects: Sequence[Effect]) -> list[tuple[str | None, str, bytes]]:
    return [
        (
            effect.command.WhichOneof("body"),
            effect.command.route.request_id,
            effect.command.route.receiver,
        )
        for effect in effects
        if isinstance(effect, SendCommand)
    ]


def failures(effects: Sequence[Effect]) -> dict[str, str]:
    return {effect.request_id: effect.error.code for effect in effects if isinstance(effect, Fail)}


def projected(core: DispatchCore) -> tuple[int, int]:
    """(prompt tokens on P, pages on D) that are promised."""
    prefill, decode = core.members.get(P.incarnation), core.members.get(D.incarnation)
    assert prefill is not None and decode is not None
    return prefill.num_projected_tokens, decode.num_projected_pages


def fill(core: DispatchCore) -> None:
    """One request that takes the whole decode worker."""
    core.submit(make_request("large", num_prompt_tokens=100, max_tokens=61), 0.0)


def test_a_request_is_sent_to_a_pair_at_once() -> None:
    core = running_core()
    effects = core.submit(make_request(), 0.0)
    assert commands(effects) == [("attach", "request", D.incarnation)]
    assert core.counts() == {
        "queued": 0,
        "prefilling": 1,
        "handoff": 0,
        "parked": 0,
        "decoding": 0,
    }
    assert projected(core) == (20, 2)


def test_projections_are_settled_as_the_request_advances() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    effects = core.on_event(attached(D.incarnation), 0.0)
    assert commands(effects) == [("prefill", "request", P.incarnation)]
    assert projected(core) == (20, 2)
    core.on_event(first_token(P.incarnation), 0.0)
    assert projected(core) == (0, 2)
    core.on_event(ready(D.incarnation), 0.0)
    assert core.counts()["decoding"] == 1
    finish = pb.FINISH_REASON_LENGTH
    (delivery,) = core.on_event(tokens(D.incarnation, finish=finish), 0.0)
    assert isinstance(delivery, Deliver)
    assert projected(core) == (0, 0)
    assert not any(core.counts().values())


def test_workers_are_told_for_how_long_a_request_has_waited() -> None:
    """Since it came, not since its last attempt began: by that decode workers order their queue."""
    core = running_core()
    core.submit(make_request(), 1.0)
    (prefill,) = bodies(core.on_event(attached(D.incarnation), 3.5))
    assert prefill.prefill.age_s == 2.5
    core.on_worker_lost(P.incarnation, 4.0)
    core.on_registered(registration("prefill-1", pb.ROLE_PREFILL), 5.0)
    (prefill,) = bodies(core.on_event(attached(D.incarnation, attempt=2), 6.0))
    assert prefill.prefill.age_s == 5.0


def test_each_attempt_has_its_own_ticket() -> None:
    core = running_core()
    first = core.submit(make_request("first"), 0.0)[0]
    second = core.submit(make_request("second"), 0.0)[0]
    assert isinstance(first, SendCommand) and isinstance(second, SendCommand)
    assert first.command.attach.ticket != second.command.attach.ticket


def test_the_queue_is_ordered_by_priority_then_arrival() -> None:
    core = running_core(max_queued=4)
    fill(core)
    for name, priority in (("idle", 1), ("first", 0), ("urgent", -1), ("second", 0)):
        core.submit(make_request(name, priority=priority), 0.0)
    effects = core.cancel("large", "test")
    attached_in_order = [name for body, name, _ in commands(effects) if body == "attach"]
    assert attached_in_order == ["urgent", "first", "second", "idle"]


def test_who_has_waited_for_half_of_its_time_goes_before_everybody_younger() -> None:
    core = running_core(max_queued=4)
    core.tick(0.0)  # later ones see that the router stood still, not its workers
    fill(core)
    core.submit(make_request("idle", priority=1, queue_deadline=30.0), 0.0)
    core.submit(make_request("urgent", priority=-1, queue_deadline=44.0), 14.0)
    core.tick(14.0)
    core.submit(make_request("younger", priority=-1, queue_deadline=45.0), 15.0)
    core.tick(15.0)
    effects = core.cancel("large", "test")
    attached_in_order = [name for body, name, _ in commands(effects) if body == "attach"]
    assert attached_in_order == ["idle", "urgent", "younger"]


def test_what_does_not_fit_waits_in_order() -> None:
    core = running_core(max_queued=3)
    fill(core)
    assert core.submit(make_request("second", num_prompt_tokens=150), 0.0) == []
    assert core.submit(make_request("third", num_prompt_tokens=100), 0.0) == []
    assert core.counts()["queued"] == 2
    effects = core.cancel("large", "test")
    assert commands(effects)[2:] == [("attach", "second", D.incarnation)]
    assert core.counts()["queued"] == 1


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    core = running_core()
    core.submit(make_request("first", num_prompt_tokens=80), 0.0)
    core.submit(make_request("large", num_prompt_tokens=100), 0.0)
    assert core.submit(make_request("small", num_prompt_tokens=1), 0.0) == []


def test_the_queue_is_bounded() -> None:
    core = running_core(max_queued=1)
    fill(core)
    core.submit(make_request("waiting"), 0.0)
    with pytest.raises(RequestFailed) as refusal:
        core.submit(make_request("refused"), 0.0)
    assert (refusal.value.status, refusal.value.code) == (503, "overloaded")
    assert refusal.value.retry_after_s == 1
    assert core.counts()["queued"] == 1


@pytest.mark.parametrize(("max_tokens", "fits"), [(61, True), (62, False)])
def test_a_request_that_never_fits_is_refused(max_tokens: int, fits: bool) -> None:
    core = running_core()
    assert core.max_kv_tokens() == 160
    request = make_request(num_prompt_tokens=100, max_tokens=max_tokens)
    if fits:
        assert core.submit(request, 0.0)
        return
    with pytest.raises(RequestFailed) as refusal:
        core.submit(request, 0.0)
    assert (refusal.value.status, refusal.value.param) == (400, "max_tokens")


@pytest.mark.parametrize(("info", "missing"), [(P, "decode"), (D, "prefill")])
def test_without_a_pair_nothing_is_taken(info: pb.RegisterRequest, missing: str) -> None:
    core = make_core()
    core.on_registered(info, 0.0)
    assert (core.max_kv_tokens() == 0) == (missing == "decode")
    with pytest.raises(RequestFailed, match=f"no {missing} worker") as refusal:
        core.submit(make_request(), 0.0)
    assert (refusal.value.status, refusal.value.code) == (503, "no_workers")


def test_a_cancel_frees_both_workers_and_is_idempotent() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    effects = core.cancel("request", "test")
    assert commands(effects) == [
        ("abort", "request", P.incarnation),
        ("abort", "request", D.incarnation),
    ]
    assert core.cancel("request", "test") == []
    assert core.cancel("unknown", "test") == []
    assert projected(core) == (0, 0)


def test_a_queued_request_can_be_cancelled() -> None:
    core = running_core()
    fill(core)
    core.submit(make_request(), 0.0)
    assert core.cancel("request", "test") == []
    assert core.counts()["queued"] == 0


def test_deadlines() -> None:
    core = running_core()
    fill(core)
    core.submit(make_request(queue_deadline=5.0), 0.0)
    for now in (1.0, 2.5, 5.0):
        core.on_event(heartbeat(P.incarnation), now)
        core.on_event(heartbeat(D.incarnation), now)
        assert core.tick(now) == []
    assert failures(core.tick(5.1)) == {"request": "timeout"}
    for now in range(6, 62):
        core.on_event(heartbeat(P.incarnation), now)
        core.on_event(heartbeat(D.incarnation), now)
    assert core.tick(60.0) == []
    effects = core.tick(60.1)
    assert failures(effects) == {"large": "timeout"}
    assert len(commands(effects)) == 2
    assert projected(core) == (0, 0)


def test_room_that_a_deadline_makes_is_used() -> None:
    core = running_core()
    core.submit(make_request("late", num_prompt_tokens=100, max_tokens=61, deadline=1.0), 0.0)
    core.submit(make_request("waiting"), 0.0)
    assert ("attach", "waiting", D.incarnation) in commands(core.tick(1.1))


@pytest.mark.parametrize("info", [P, D])
def test_requests_of_a_lost_worker_wait_for_another(info: pb.RegisterRequest) -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    effects = core.on_worker_lost(info.incarnation, 1.0)
    aborts = [] if info is P else [("abort", "request", P.incarnation)]  # D holds the Reservation
    assert (commands(effects), failures(effects)) == (aborts, {})
    assert core.on_worker_lost(info.incarnation, 1.0) == []
    assert core.counts()["queued"] == 1
    successor = registration(info.name, info.role, incarnation=b"n" * 16)
    (effect,) = core.on_registered(successor, 2.0)
    assert isinstance(effect, SendCommand) and effect.command.HasField("attach")
    assert effect.command.route.attempt == 2


def test_a_stream_that_decodes_needs_no_prefill_worker() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    core.on_event(ready(D.incarnation), 0.0)
    assert core.on_event(failed(P.incarnation, pb.FAILURE_CODE_PEER_LOST), 0.0) == []
    assert core.on_worker_lost(P.incarnation, 1.0) == []
    assert core.counts()["decoding"] == 1


def test_a_silent_worker_is_given_up() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    core.on_event(heartbeat(P.incarnation), 3.0)
    assert core.tick(3.0) == []
    assert commands(core.tick(3.1)) == [("abort", "request", P.incarnation)]
    assert core.counts()["queued"] == 1
    assert core.members.get(D.incarnation) is None
    assert core.members.get(P.incarnation) is not None


def test_a_new_incarnation_replaces_the_old_one() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    successor = registration("decode-0", pb.ROLE_DECODE, incarnation=b"n" * 16)
    assert ("attach", "request", successor.incarnation) in commands(
        core.on_registered(successor, 1.0)
    )
    assert core.members.get(D.incarnation) is None
    dropped = core.num_dropped
    assert core.on_event(tokens(D.incarnation), 1.0) == []
    assert core.num_dropped == dropped + 1


def test_a_worker_that_registers_again_starts_without_promises() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    core.cancel("request", "test")
    core.on_registered(D, 1.0)
    assert projected(core) == (0, 0)


def test_a_worker_that_joins_gets_what_waits() -> None:
    core = running_core()
    fill(core)
    core.submit(make_request(), 0.0)
    spare = registration("decode-1", pb.ROLE_DECODE)
    assert commands(core.on_registered(spare, 1.0)) == [("attach", "request", spare.incarnation)]


def test_a_worker_that_does_not_fit_is_refused() -> None:
    core = running_core()
    misfit = registration("decode-1", pb.ROLE_DECODE)
    misfit.layout.head_dim = 2
    with pytest.raises(RegistrationRefused, match=r"layout\.head_dim"):
        core.on_registered(misfit, 0.0)
    assert core.members.named("decode-1") is None


def test_a_heartbeat_is_remembered() -> None:
    core = running_core()
    core.on_event(heartbeat(D.incarnation, pb.WorkerState(running=3)), 2.0)
    member = core.members.get(D.incarnation)
    assert member is not None
    assert (member.state.running, member.last_seen) == (3, 2.0)


@pytest.mark.parametrize(
    "event",
    [
        tokens(b"x" * 16),
        tokens(D.incarnation, request_id="unknown"),
        pb.WorkerEvent(route=pb.Route(sender=D.incarnation, receiver=b"x" * 16)),
    ],
    ids=["unknown worker", "unknown request", "another router"],
)
def test_events_for_nobody_are_counted(event: pb.WorkerEvent) -> None:
    core = running_core()
    assert core.on_event(event, 0.0) == []
    assert core.num_dropped == 1


def test_a_pause_of_the_router_is_not_held_against_its_workers() -> None:
    core = make_core()
    core.on_registered(P, 0.0)
    core.tick(0.5)
    core.tick(60.0)
    assert core.members.get(P.incarnation) is not None
    for step in range(1, 14):
        core.tick(60.0 + step * 0.25)
    assert core.members.get(P.incarnation) is None


def test_prompt_and_output_are_held_against_the_worker_that_holds_them() -> None:
    core = make_core()
    core.on_registered(registration("prefill-0", pb.ROLE_PREFILL, num_pages=2), 0.0)
    core.on_registered(registration("decode-0", pb.ROLE_DECODE, num_pages=20), 0.0)
    assert core.submit(make_request(num_prompt_tokens=2 * PAGE_SIZE, max_tokens=200), 0.0)
    with pytest.raises(RequestFailed, match="more KV cache"):
        core.submit(make_request("other", num_prompt_tokens=2 * PAGE_SIZE + 1, max_tokens=1), 0.0)


def test_what_no_worker_could_hold_stands_aside() -> None:
    """The only large decode worker dies while a large request waits: small ones go on."""
    core = make_core(max_queued=3)
    large = registration("decode-0", pb.ROLE_DECODE, num_pages=10)
    for info in (P, large, registration("decode-1", pb.ROLE_DECODE, num_pages=2)):
        core.on_registered(info, 0.0)
    assert core.submit(make_request("first", max_tokens=100), 0.0)
    assert not core.submit(make_request("large", max_tokens=100), 0.0)
    core.on_worker_lost(large.incarnation, 1.0)
    assert core.counts()["queued"] == 2
    assert core.submit(make_request("small", max_tokens=4), 0.0)


def test_a_router_that_stops_fails_what_runs_and_takes_no_more() -> None:
    core = running_core()
    core.submit(make_request("running", max_tokens=100), 0.0)
    core.submit(make_request("queued", max_tokens=100), 0.0)
    effects = core.refuse_all()
    assert failures(effects) == {"running": "stopping", "queued": "stopping"}
    assert core.refuse_all() == []
    with pytest.raises(RequestFailed, match="the server is stopping"):
        core.submit(make_request("late"), 0.0)


def test_a_prompt_is_hashed_for_every_page_size_of_a_worker() -> None:
    secret = bytes(KEY_BYTES)
    core = make_core(page_secret=secret)
    core.on_registered(P, 0.0)
    cached = registration("prefill-1", pb.ROLE_PREFILL)
    cached.layout.page_size = 64
    core.on_registered(cached, 0.0)
    core.on_registered(D, 0.0)
    request = make_request(num_prompt_tokens=70)
    keys = PageHasher(secret=secret, page_size=64).keys(request.token_ids)
    route = heartbeat(cached.incarnation).route
    delta = pb.KvDelta(epoch=1, seq=0, stored=[key.hash for key in keys])
    core.on_event(pb.WorkerEvent(route=route, kv_delta=delta), 0.0)
    core.submit(request, 0.0)
    member = core.members.get(cached.incarnation)
    assert member is not None
    assert member.num_projected_tokens == 70 - 64


def test_a_gap_in_what_a_worker_says_of_its_cache_is_asked_about() -> None:
    core = running_core()
    route = heartbeat(P.incarnation).route
    first = pb.WorkerEvent(route=route, kv_delta=pb.KvDelta(epoch=1, seq=0))
    assert core.on_event(first, 0.0) == []
    gap = pb.WorkerEvent(route=route, kv_delta=pb.KvDelta(epoch=1, seq=2))
    (effect,) = core.on_event(gap, 0.0)
    assert isinstance(effect, SendCommand)
    assert effect.command.HasField("kv_snapshot")
    assert effect.command.route.receiver == P.incarnation


E = registration("decode-1", pb.ROLE_DECODE)


def handing_off_core() -> DispatchCore:
    """Two decode workers; the first has been promised a prompt that the prefill worker computes."""
    core = running_core()
    core.on_registered(E, 0.0)
    core.submit(make_request(), 0.0)
    core.on_event(attached(D.incarnation), 0.0)
    return core


def pages_promised(core: DispatchCore) -> dict[str, int]:
    decode = core.members.of_role(pb.ROLE_DECODE)
    return {member.info.name: member.num_projected_pages for member in decode}


def bodies(effects: Sequence[Effect]) -> list[pb.WorkerCommand]:
    return [effect.command for effect in effects if isinstance(effect, SendCommand)]


def test_what_is_parked_goes_to_another_decode_worker() -> None:
    core = handing_off_core()
    effects = core.on_event(parked_event(P.incarnation), 1.0)
    assert commands(effects) == [
        ("abort", "request", D.incarnation),
        ("attach", "request", E.incarnation),
    ]
    assert pages_promised(core) == {"decode-0": 0, "decode-1": 2}
    attach = bodies(effects)[-1]
    (repoint,) = bodies(core.on_event(attached(E.incarnation, attempt=2), 1.0))
    assert repoint.repoint == pb.Repoint(
        held_attempt=1,
        ticket=attach.attach.ticket,
        decode=E.incarnation,
        transports=E.transports,
    )
    assert (repoint.route.attempt, repoint.route.receiver) == (2, P.incarnation)
    assert projected(core)[0] == 20  # it computes on
    assert core.retries == {"dispatch": 0, "repoint": 1}


def test_a_lost_decode_worker_is_replaced_before_the_prefill_worker_knows() -> None:
    core = handing_off_core()
    core.on_event(first_token(P.incarnation), 0.5)
    effects = core.on_worker_lost(D.incarnation, 1.0)
    assert commands(effects) == [("attach", "request", E.incarnation)]
    assert core.on_event(parked_event(P.incarnation), 1.0) == []  # of the attempt before
    (repoint,) = bodies(core.on_event(attached(E.incarnation, attempt=2), 1.0))
    assert repoint.repoint.held_attempt == 1
    core.on_event(ready(E.incarnation, attempt=2), 1.0)
    assert core.counts()["decoding"] == 1


def test_a_decode_worker_that_failed_a_prompt_gets_it_again_only_if_there_is_no_other() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    core.on_event(attached(D.incarnation), 0.0)
    effects = core.on_event(parked_event(P.incarnation), 0.0)
    assert commands(effects) == [("abort", "request", D.incarnation)]
    assert core.counts()["parked"] == 1
    assert commands(core.tick(0.25)) == [("attach", "request", D.incarnation)]
    assert core.counts()["parked"] == 0


def test_what_is_parked_waits_for_a_decode_worker_that_joins() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    core.on_event(attached(D.incarnation), 0.0)
    assert commands(core.on_worker_lost(D.incarnation, 1.0)) == []
    assert commands(core.tick(1.25)) == [("renew_lease", "request", P.incarnation)]
    assert commands(core.on_registered(E, 2.0)) == [("attach", "request", E.incarnation)]


def test_what_is_parked_is_kept_for_as_long_as_no_decode_worker_is_there() -> None:
    """One that starts again with a large model takes longer than a lease lasts."""
    core = running_core()
    core.submit(make_request(), 0.0)
    core.on_event(attached(D.incarnation), 0.0)
    core.on_worker_lost(D.incarnation, 1.0)
    renewals: list[float] = []
    for quarter in range(5, 125):
        now = quarter / 4
        core.on_event(heartbeat(P.incarnation), now)
        for command in bodies(core.tick(now)):
            assert command.HasField("renew_lease")
            assert (command.route.receiver, command.route.attempt) == (P.incarnation, 1)
            renewals.append(now)
    assert renewals == [1.25 + second for second in range(30)]
    (attach,) = bodies(core.on_registered(E, 32.0))
    assert attach.HasField("attach")
    (repoint,) = bodies(core.on_event(attached(E.incarnation, attempt=2), 32.0))
    assert repoint.repoint.held_attempt == 1
    assert core.tick(33.0) == []


def test_what_nobody_took_before_its_lease_ran_out_is_dispatched_again() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    core.on_event(attached(D.incarnation), 0.0)
    core.on_worker_lost(D.incarnation, 1.0)
    assert core.on_event(failed(P.incarnation, pb.FAILURE_CODE_NOT_PARKED), 11.0) == []
    assert core.counts()["queued"] == 1
    (attach,) = bodies(core.on_registered(E, 12.0))
    assert (attach.route.attempt, attach.route.receiver) == (2, E.incarnation)
    (prefill,) = bodies(core.on_event(attached(E.incarnation, attempt=2), 12.0))
    assert prefill.HasField("prefill")


def test_a_retry_that_finds_no_worker_in_time_says_what_was_lost() -> None:
    core = running_core()
    core.submit(make_request(queue_deadline=5.0), 0.0)
    core.on_worker_lost(D.incarnation, 4.0)
    for now in (5.5, 8.0, 9.0):
        core.on_event(heartbeat(P.incarnation), now)
        assert core.tick(now) == []
    assert failures(core.tick(9.1)) == {"request": "worker_lost"}


def test_a_repoint_that_comes_too_late_is_dispatched_again() -> None:
    core = handing_off_core()
    core.on_worker_lost(D.incarnation, 1.0)
    core.on_event(attached(E.incarnation, attempt=2), 1.0)
    failure = failed(P.incarnation, pb.FAILURE_CODE_NOT_PARKED, attempt=2)
    effects = core.on_event(failure, 1.0)
    assert commands(effects) == [
        ("abort", "request", E.incarnation),
        ("attach", "request", E.incarnation),
    ]
    (prefill,) = bodies(core.on_event(attached(E.incarnation, attempt=3), 1.0))
    assert prefill.HasField("prefill")


def test_what_is_parked_goes_before_what_is_queued_even_to_a_full_worker() -> None:
    """Room that is promised to prompts behind it must not keep it waiting."""
    core = running_core()
    core.submit(make_request("parked", num_prompt_tokens=80), 0.0)
    core.on_event(attached(D.incarnation, "parked"), 0.0)
    core.submit(make_request("queued", num_prompt_tokens=80), 0.0)
    effects = core.on_event(parked_event(P.incarnation, request_id="parked"), 0.0)
    assert ("attach", "queued", D.incarnation) in commands(effects)
    assert commands(core.tick(0.25)) == [("attach", "parked", D.incarnation)]
    assert pages_promised(core) == {"decode-0": 10}


def lose_prefill(core: DispatchCore, number: int) -> list[Effect]:
    """The prefill worker dies; its successor is there at once."""
    name = f"prefill-{number}"
    member = core.members.named(name)
    assert member is not None
    core.on_registered(registration(f"prefill-{number + 1}", pb.ROLE_PREFILL), 0.0)
    return core.on_worker_lost(member.incarnation, 0.0)


def test_a_request_is_dispatched_three_times_at_most() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    for number in range(2):
        assert ("attach", "request", D.incarnation) in commands(lose_prefill(core, number))
    assert failures(lose_prefill(core, 2)) == {"request": "worker_lost"}
    assert pages_promised(core) == {"decode-0": 0}


def test_a_retry_goes_on_behind_what_its_client_was_told() -> None:
    core = handing_off_core()
    core.on_event(tokens(D.incarnation, (5, 6)), 0.0)
    effects = core.on_worker_lost(D.incarnation, 1.0)
    (abort, attach) = bodies(effects)
    assert abort.HasField("abort")
    (prefill,) = bodies(core.on_event(attached(E.incarnation, attempt=2), 1.0))
    for body in (attach.attach, prefill.prefill):
        assert list(body.token_ids) == [*range(20), 5, 6]
        assert (body.num_output_tokens, body.sampling.max_tokens) == (2, 4)
    told = first_token(P.incarnation, 7, attempt=2)
    told.first_token.position = 2
    (delivery,) = core.on_event(told, 1.0)
    assert isinstance(delivery, Deliver)
    assert (delivery.update.position, delivery.update.token_ids) == (2, (7,))


def test_several_choices_are_generated_again() -> None:
    core = running_core()
    core.on_registered(E, 0.0)
    core.submit(make_request(n=2), 0.0)
    core.on_event(attached(D.incarnation), 0.0)
    core.on_event(tokens(D.incarnation, (5, 6), choice=1), 0.0)
    core.stop_choice("request", 0)
    (_, attach, stop) = bodies(core.on_worker_lost(D.incarnation, 1.0))
    assert (len(attach.attach.token_ids), attach.attach.num_output_tokens) == (20, 0)
    assert (stop.stop_choice.choice, stop.route.receiver) == (0, E.incarnation)
    core.on_event(attached(E.incarnation, attempt=2), 1.0)
    again = tokens(E.incarnation, (5, 6, 7), choice=1, attempt=2)
    (delivery,) = core.on_event(again, 1.0)
    assert isinstance(delivery, Deliver)
    assert (delivery.update.position, delivery.update.token_ids) == (2, (7,))


def test_retries_that_no_loss_explains_are_held_against_a_budget() -> None:
    core = running_core(max_queued=10)
    outcomes = []
    for index in range(4):
        name = f"request-{index}"
        core.submit(make_request(name), 0.0)
        core.on_event(attached(D.incarnation, name), 0.0)
        failure = failed(P.incarnation, pb.FAILURE_CODE_NOT_PARKED, name)
        outcomes.append(failures(core.on_event(failure, 0.0)))
        core.cancel(name, "test")
    assert outcomes == [{}, {}, {}, {"request-3": "worker_lost"}]


def test_a_prefill_worker_above_its_watermark_gets_nothing() -> None:
    core = make_core()
    info = registration("prefill-0", pb.ROLE_PREFILL)
    info.max_parked_pages = 5
    core.on_registered(info, 0.0)
    core.on_registered(D, 0.0)
    core.on_event(heartbeat(info.incarnation, pb.WorkerState(parked_pages=6)), 0.0)
    assert core.submit(make_request(), 0.0) == []
    assert core.counts()["queued"] == 1
    effects = core.on_event(heartbeat(info.incarnation, pb.WorkerState(parked_pages=5)), 1.0)
    assert commands(effects) == [("attach", "request", D.incarnation)]


def test_a_retry_that_has_outgrown_the_prefill_workers_stands_aside() -> None:
    core = make_core(max_queued=10)
    core.on_registered(registration("prefill-0", pb.ROLE_PREFILL, num_pages=2), 0.0)
    for info in (D, E):
        core.on_registered(info, 0.0)
    core.submit(make_request("long", num_prompt_tokens=32, max_tokens=40, queue_deadline=5.0), 0.0)
    core.on_event(tokens(D.incarnation, (5, 6), request_id="long"), 0.0)
    core.on_worker_lost(D.incarnation, 1.0)
    assert core.counts()["queued"] == 1
    assert commands(core.submit(make_request("short"), 1.0)) == [("attach", "short", E.incarnation)]


Q = registration("prefill-1", pb.ROLE_PREFILL)


def held_core() -> DispatchCore:
    """A request whose prefill worker is lost; its decode worker, of two, holds the Reservation."""
    core = handing_off_core()
    assert commands(core.on_worker_lost(P.incarnation, 1.0)) == []
    return core


def test_the_next_attempt_takes_the_reservation_over() -> None:
    core = held_core()
    assert pages_promised(core) == {"decode-0": 2, "decode-1": 0}
    (attach,) = bodies(core.on_registered(Q, 2.0))
    assert (attach.route.receiver, attach.attach.held_attempt) == (D.incarnation, 1)
    assert attach.attach.prefill == Q.incarnation
    assert pages_promised(core) == {"decode-0": 2, "decode-1": 0}
    core.on_event(attached(D.incarnation, attempt=2), 2.0)
    core.on_event(ready(D.incarnation, attempt=2), 2.0)
    assert commands(core.cancel("request", "test")) == [
        ("abort", "request", Q.incarnation),
        ("abort", "request", D.incarnation),
    ]
    assert pages_promised(core) == {"decode-0": 0, "decode-1": 0}


def test_the_room_that_is_held_is_promised_to_nobody_else() -> None:
    """Though the other decode worker is empty, the request goes where its Reservation is."""
    core = running_core(max_queued=10)
    core.submit(make_request("held", num_prompt_tokens=140), 0.0)
    core.on_event(attached(D.incarnation, "held"), 0.0)
    core.on_registered(Q, 0.5)
    (attach,) = bodies(core.on_worker_lost(P.incarnation, 1.0))
    assert (attach.route.receiver, attach.attach.held_attempt) == (D.incarnation, 1)
    core.on_worker_lost(Q.incarnation, 2.0)
    core.on_registered(P, 3.0)
    assert pages_promised(core) == {"decode-0": 9}
    assert core.submit(make_request("newcomer", num_prompt_tokens=40), 4.0) == []


def test_what_is_held_is_given_back_when_the_request_ends() -> None:
    core = held_core()
    assert commands(core.cancel("request", "test")) == [("abort", "request", D.incarnation)]
    assert pages_promised(core) == {"decode-0": 0, "decode-1": 0}


def test_a_decode_worker_that_is_lost_holds_nothing() -> None:
    core = held_core()
    assert commands(core.on_worker_lost(D.incarnation, 2.0)) == []
    (attach,) = bodies(core.on_registered(Q, 3.0))
    assert (attach.route.receiver, attach.attach.held_attempt) == (E.incarnation, 0)


def test_a_decode_worker_may_know_of_the_loss_first() -> None:
    """What it holds is not given away before the prefill worker had time to be found lost."""
    core = handing_off_core()
    core.on_registered(Q, 0.5)
    lost = failed(D.incarnation, pb.FAILURE_CODE_PEER_LOST)
    assert core.on_event(lost, 1.0) == []
    (attach,) = bodies(core.on_worker_lost(P.incarnation, 1.01))
    assert (attach.route.receiver, attach.attach.held_attempt) == (D.incarnation, 1)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_prefill_worker_that_lives_is_sent_to_another_decode_worker(says_so: bool) -> None:
    """Only the connection was lost."""
    core = handing_off_core()
    core.on_event(failed(D.incarnation, pb.FAILURE_CODE_PEER_LOST), 1.0)
    effects = core.on_event(parked_event(P.incarnation), 1.0) if says_so else core.tick(1.25)
    assert commands(effects) == [
        ("abort", "request", D.incarnation),
        ("attach", "request", E.incarnation),
    ]
    assert pages_promised(core) == {"decode-0": 0, "decode-1": 2}


def test_the_only_decode_worker_gets_the_prompt_again_for_the_room_that_it_holds() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    core.on_event(attached(D.incarnation), 0.0)
    core.on_event(failed(D.incarnation, pb.FAILURE_CODE_PEER_LOST), 1.0)
    (attach,) = bodies(core.tick(1.25))
    assert (attach.route.receiver, attach.attach.held_attempt) == (D.incarnation, 1)
    (repoint,) = bodies(core.on_event(attached(D.incarnation, attempt=2), 1.3))
    assert repoint.repoint.held_attempt == 1


def refuse(core: DispatchCore, decode: pb.RegisterRequest, attempt: int, now: float) -> list[bytes]:
    """It attaches, then has no room; returns which decode workers are asked next."""
    core.on_event(attached(decode.incarnation, attempt=attempt), now)
    full = failed(decode.incarnation, pb.FAILURE_CODE_FULL, attempt=attempt)
    effects = core.on_event(full, now)
    effects += core.on_event(parked_event(P.incarnation, full.failed.code, attempt=attempt), now)
    return [command.route.receiver for command in bodies(effects) if command.HasField("attach")]


def ticks(core: DispatchCore, now: float, until: float) -> list[bytes]:
    """The decode workers that are asked meanwhile."""
    asked = []
    while now < until:
        for info in (P, D, E):
            core.on_event(heartbeat(info.incarnation), now)
        asked += [command.route.receiver for command in bodies(core.tick(now))]
        now += 0.25
    return asked


def test_where_all_are_full_each_is_asked_once_a_second() -> None:
    core = handing_off_core()
    attempt, now = 1, 1.0
    for _ in range(20):  # far more than the attempts that a request has
        assert refuse(core, D, attempt, now) == [E.incarnation]
        assert refuse(core, E, attempt + 1, now) == []
        assert ticks(core, now + 0.25, now + 1.0) == []
        attempt, now = attempt + 2, now + 1.0
        assert ticks(core, now, now + 0.25) == [D.incarnation]
    assert core.counts()["handoff"] + core.counts()["prefilling"] == 1
    assert failures(core.tick(61.0)) == {"request": "timeout"}


def test_a_decode_worker_that_joins_is_asked_at_once() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    assert refuse(core, D, 1, 1.0) == []
    assert commands(core.on_registered(E, 1.1)) == [("attach", "request", E.incarnation)]


def test_what_is_parked_for_nobody_is_released() -> None:
    core = running_core()
    core.submit(make_request(), 0.0)
    core.on_event(tokens(D.incarnation, finish=pb.FINISH_REASON_STOP), 1.0)
    assert commands(core.on_event(parked_event(P.incarnation), 1.0)) == [
        ("abort", "request", P.incarnation)
    ]


def test_a_hand_off_for_choices_that_were_stopped_is_ended_at_both_workers() -> None:
    core = running_core()
    core.submit(make_request(n=2), 0.0)
    core.on_event(attached(D.incarnation), 0.0)
    core.stop_choice("request", 1)
    effects = core.on_event(first_token(P.incarnation, finish=pb.FINISH_REASON_STOP), 1.0)
    assert commands(effects) == [
        ("abort", "request", P.incarnation),
        ("abort", "request", D.incarnation),
    ]


def test_what_was_read_before_a_pause_is_noticed_counts_from_then_on() -> None:
    """A worker whose heartbeat came right after the pause has not been heard in the future."""
    core = running_core()
    core.tick(0.0)
    core.on_event(heartbeat(P.incarnation), 60.0)
    core.on_event(heartbeat(D.incarnation), 60.0)
    core.tick(60.0)
    for now in (61.0, 62.0, 63.0):
        core.on_event(heartbeat(D.incarnation), now)
        assert core.members.get(P.incarnation) is not None
        core.tick(now)
    core.tick(63.1)
    assert core.members.get(P.incarnation) is None
