"""Every pair of a state and an event, against the table in the docstring of the module."""

from collections.abc import Callable

import pytest
from routing import (
    ROUTER,
    attached,
    failed,
    first_token,
    heartbeat,
    make_request,
    parked_event,
    ready,
    sealed,
    tokens,
)

from pagewire.proto import worker_pb2 as pb
from pagewire.router.commands import Assignment
from pagewire.router.lifecycle import (
    Deliver,
    Effect,
    Fail,
    Lifecycle,
    SendCommand,
    State,
    worker_failure,
)
from pagewire.router.request import FinishReason, RequestFailed

P = b"p" * 16
D = b"d" * 16
STOP = pb.FINISH_REASON_STOP

ASSIGNMENT = Assignment(
    attempt=1, prefill=P, decode=D, transports=(("tcp", b"there"),), ticket=b"t" * 16
)


def admitted() -> Lifecycle:
    return Lifecycle(make_request(), ROUTER)


def queued() -> Lifecycle:
    lifecycle = admitted()
    lifecycle.enqueue(0.0)
    return lifecycle


def prefilling() -> Lifecycle:
    lifecycle = queued()
    lifecycle.dispatch(ASSIGNMENT)
    return lifecycle


def prefill_sent() -> Lifecycle:
    lifecycle = prefilling()
    lifecycle.on_event(attached(D), 0.0)
    return lifecycle


def handing_off() -> Lifecycle:
    lifecycle = prefill_sent()
    lifecycle.on_event(first_token(P), 0.0)
    return lifecycle


def handed_over() -> Lifecycle:
    lifecycle = handing_off()
    lifecycle.on_event(sealed(P), 0.0)
    return lifecycle


def parked() -> Lifecycle:
    lifecycle = handing_off()
    lifecycle.on_event(parked_event(P), 0.0)
    return lifecycle


def parked_while_computing() -> Lifecycle:
    lifecycle = prefill_sent()
    lifecycle.on_event(parked_event(P), 0.0)
    return lifecycle


def parked_and_held() -> Lifecycle:
    lifecycle = handing_off()
    lifecycle.on_event(failed(D, pb.FAILURE_CODE_PEER_LOST), 0.0)
    return lifecycle


def retrying() -> Lifecycle:
    lifecycle = handing_off()
    lifecycle.on_worker_lost(P)
    return lifecycle


def decoding() -> Lifecycle:
    lifecycle = handing_off()
    lifecycle.on_event(ready(D), 0.0)
    return lifecycle


def done() -> Lifecycle:
    lifecycle = decoding()
    lifecycle.on_event(tokens(D, finish=STOP), 0.0)
    return lifecycle


def cancelled() -> Lifecycle:
    lifecycle = decoding()
    lifecycle.cancel("test")
    return lifecycle


def failed_before() -> Lifecycle:
    lifecycle = decoding()
    lifecycle.on_event(failed(D), 0.0)
    return lifecycle


Make = Callable[[], Lifecycle]
Happen = Callable[[Lifecycle], list[Effect]]


def event(item: pb.WorkerEvent) -> Happen:
    return lambda lifecycle: lifecycle.on_event(item, 0.0)


EVENTS: dict[str, Happen] = {
    "Attached": event(attached(D)),
    "FirstToken": event(first_token(P)),
    "FirstToken, finished": event(first_token(P, finish=STOP)),
    "Sealed": event(sealed(P)),
    "Ready": event(ready(D)),
    "Tokens": event(tokens(D)),
    "Tokens, finished": event(tokens(D, finish=STOP)),
    "Parked": event(parked_event(P)),
    "Failed by P": event(failed(P)),
    "Not parked": event(failed(P, pb.FAILURE_CODE_NOT_PARKED)),
    "Failed by D": event(failed(D)),
    "Hand-off failed by D": event(failed(D, pb.FAILURE_CODE_PEER_LOST)),
    "Full, says D": event(failed(D, pb.FAILURE_CODE_FULL)),
    "P lost": lambda lifecycle: lifecycle.on_worker_lost(P),
    "D lost": lambda lifecycle: lifecycle.on_worker_lost(D),
    "deadline": lambda lifecycle: lifecycle.fail(
        RequestFailed("late", status=408, kind="timeout_error", code="timeout")
    ),
    "cancel": lambda lifecycle: lifecycle.cancel("test"),
    "the only choice stopped": lambda lifecycle: lifecycle.stop_choice(0),
}

PARKED = (State.PARKED, ["Abort to D"])
PARKED_BY_D: tuple[State, list[str]] = (State.PARKED, [])
PARKED_AND_HELD = PARKED_BY_D
RETRYING_AND_HELD: tuple[State, list[str]] = (State.RETRYING, [])
RETRYING_BY_P = (State.RETRYING, ["Abort to D"])
RETRYING_BY_D = (State.RETRYING, ["Abort to P"])
FAILED_BY_P = (State.FAILED, ["Abort to D", "Fail"])
FAILED_BY_D = (State.FAILED, ["Abort to P", "Fail"])
FAILED_ON_TIME = (State.FAILED, ["Abort to P", "Abort to D", "Fail"])
CANCELLED = (State.CANCELLED, ["Abort to P", "Abort to D"])

# What is not named here changes nothing.
BEFORE_P_IS_TOLD: dict[str, tuple[State, list[str]]] = {
    "Attached": (State.PREFILLING, ["Prefill to P"]),
    "Ready": (State.DECODING, []),
    "Tokens": (State.DECODING, ["Deliver [5, 6]"]),
    "Tokens, finished": (State.DONE, ["Deliver [5, 6] stop"]),
    "Failed by D": FAILED_BY_D,
    "Hand-off failed by D": RETRYING_BY_D,
    "Full, says D": RETRYING_BY_D,
    "P lost": RETRYING_AND_HELD,
    "D lost": RETRYING_BY_D,
    "deadline": FAILED_ON_TIME,
    "cancel": CANCELLED,
    "the only choice stopped": CANCELLED,
}
IN_HANDOFF: dict[str, tuple[State, list[str]]] = {
    "FirstToken, finished": (State.DONE, ["Deliver [] stop", "Abort to P", "Abort to D"]),
    "Ready": (State.DECODING, []),
    "Tokens": (State.DECODING, ["Deliver [6]"]),
    "Tokens, finished": (State.DONE, ["Deliver [6] stop"]),
    "Parked": PARKED,
    "Failed by P": FAILED_BY_P,
    "Not parked": RETRYING_BY_P,
    "Failed by D": FAILED_BY_D,
    "Hand-off failed by D": PARKED_AND_HELD,
    "Full, says D": PARKED_BY_D,
    "P lost": RETRYING_AND_HELD,
    "D lost": PARKED_BY_D,
    "deadline": FAILED_ON_TIME,
    "cancel": CANCELLED,
    "the only choice stopped": CANCELLED,
}
TABLE: dict[Make, dict[str, tuple[State, list[str]]]] = {
    admitted: {
        "deadline": (State.FAILED, ["Fail"]),
        "cancel": (State.CANCELLED, []),
        "the only choice stopped": (State.CANCELLED, []),
    },
    queued: {
        "deadline": (State.FAILED, ["Fail"]),
        "cancel": (State.CANCELLED, []),
        "the only choice stopped": (State.CANCELLED, []),
    },
    prefilling: BEFORE_P_IS_TOLD,
    prefill_sent: {
        **IN_HANDOFF,
        "FirstToken": (State.HANDOFF, ["Deliver [5]"]),
        "FirstToken, finished": (State.DONE, ["Deliver [5] stop", "Abort to P", "Abort to D"]),
        "Tokens": (State.DECODING, ["Deliver [5, 6]"]),
        "Tokens, finished": (State.DONE, ["Deliver [5, 6] stop"]),
    },
    handing_off: IN_HANDOFF,
    handed_over: {name: cell for name, cell in IN_HANDOFF.items() if name != "P lost"},
    parked: {
        "FirstToken, finished": (State.DONE, ["Deliver [] stop", "Abort to P"]),
        "Failed by P": (State.FAILED, ["Fail"]),
        "Not parked": (State.RETRYING, []),
        "P lost": (State.RETRYING, []),
        "deadline": (State.FAILED, ["Abort to P", "Fail"]),
        "cancel": (State.CANCELLED, ["Abort to P"]),
        "the only choice stopped": (State.CANCELLED, ["Abort to P"]),
    },
    parked_while_computing: {
        "FirstToken": (State.PARKED, ["Deliver [5]"]),
        "FirstToken, finished": (State.DONE, ["Deliver [5] stop", "Abort to P"]),
        "Failed by P": (State.FAILED, ["Fail"]),
        "Not parked": (State.RETRYING, []),
        "P lost": (State.RETRYING, []),
        "deadline": (State.FAILED, ["Abort to P", "Fail"]),
        "cancel": (State.CANCELLED, ["Abort to P"]),
        "the only choice stopped": (State.CANCELLED, ["Abort to P"]),
    },
    decoding: {
        "FirstToken, finished": (State.DONE, ["Deliver [] stop"]),
        "Tokens": (State.DECODING, ["Deliver [6]"]),
        "Tokens, finished": (State.DONE, ["Deliver [6] stop"]),
        "Parked": (State.DECODING, ["Abort to P"]),
        "Failed by D": FAILED_BY_D,
        "Hand-off failed by D": FAILED_BY_D,
        "Full, says D": FAILED_BY_D,
        "D lost": RETRYING_BY_D,
        "deadline": FAILED_ON_TIME,
        "cancel": CANCELLED,
        "the only choice stopped": CANCELLED,
    },
    retrying: {
        "deadline": (State.FAILED, ["Abort to D", "Fail"]),
        "cancel": (State.CANCELLED, ["Abort to D"]),
        "the only choice stopped": (State.CANCELLED, ["Abort to D"]),
    },
    parked_and_held: {
        "FirstToken, finished": (State.DONE, ["Deliver [] stop", "Abort to P", "Abort to D"]),
        "Parked": (State.PARKED, ["Abort to D"]),
        "Failed by P": FAILED_BY_P,
        "Not parked": RETRYING_AND_HELD,
        "P lost": RETRYING_AND_HELD,
        "deadline": FAILED_ON_TIME,
        "cancel": CANCELLED,
        "the only choice stopped": CANCELLED,
    },
    done: {},
    cancelled: {},
    failed_before: {},
}


def describe(effect: Effect) -> str:
    match effect:
        case SendCommand(command=command):
            worker = {P: "P", D: "D"}[command.route.receiver]
            return f"{str(command.WhichOneof('body')).capitalize()} to {worker}"
        case Deliver(update=update):
            reason = f" {update.finish_reason}" if update.finish_reason else ""
            return f"Deliver {list(update.token_ids)}{reason}"
        case Fail():
            return "Fail"


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("make", TABLE)
def test_table(make: Make, name: str) -> None:
    lifecycle = make()
    before = lifecycle.state
    after, effects = TABLE[make].get(name, (before, []))
    assert [describe(effect) for effect in EVENTS[name](lifecycle)] == effects
    assert lifecycle.state is after


STRANGERS = {
    "another attempt": [
        attached(D, attempt=2),
        first_token(P, attempt=2),
        ready(D, attempt=2),
        tokens(D, attempt=2),
        failed(D, attempt=2),
    ],
    "the wrong worker": [
        attached(P),
        first_token(D),
        ready(P),
        tokens(P),
        failed(b"x" * 16),
        heartbeat(D),
    ],
}


@pytest.mark.parametrize("make", TABLE)
@pytest.mark.parametrize("who", STRANGERS)
def test_what_is_not_addressed_to_it_changes_nothing(make: Make, who: str) -> None:
    lifecycle = make()
    before = lifecycle.state
    for item in STRANGERS[who]:
        assert lifecycle.on_event(item, 0.0) == []
    assert lifecycle.on_worker_lost(b"x" * 16) == []
    assert lifecycle.state is before


def test_both_workers_get_the_same_work() -> None:
    lifecycle = queued()
    (first,) = lifecycle.dispatch(ASSIGNMENT)
    (second,) = lifecycle.on_event(attached(D), 0.0)
    assert isinstance(first, SendCommand) and isinstance(second, SendCommand)
    attach, prefill = first.command.attach, second.command.prefill
    assert attach.token_ids == prefill.token_ids == list(range(20))
    assert attach.sampling == prefill.sampling
    assert attach.ticket == prefill.ticket == ASSIGNMENT.ticket
    assert (attach.prefill, prefill.decode) == (P, D)
    assert [(item.kind, item.address) for item in prefill.transports] == [("tcp", b"there")]
    route = second.command.route
    assert (route.request_id, route.attempt, route.sender) == ("request", 1, ROUTER)


def test_workers_learn_the_priority_and_how_long_the_request_has() -> None:
    lifecycle = Lifecycle(make_request(priority=-3, deadline=60.0), ROUTER)
    lifecycle.enqueue(0.0)
    (first,) = lifecycle.dispatch(ASSIGNMENT)
    (second,) = lifecycle.on_event(attached(D), 12.5)
    assert isinstance(first, SendCommand) and isinstance(second, SendCommand)
    assert first.command.attach.priority == second.command.prefill.priority == -3
    assert second.command.prefill.seconds_left == 47.5


def test_a_token_told_twice_is_delivered_once() -> None:
    lifecycle = prefill_sent()
    lifecycle.on_event(tokens(D, [5, 6]), 0.0)
    assert lifecycle.on_event(first_token(P, 5), 0.0) == []
    (effect,) = lifecycle.on_event(tokens(D, [7], position=2), 0.0)
    assert isinstance(effect, Deliver)
    assert (effect.update.position, effect.update.token_ids) == (2, (7,))


@pytest.mark.parametrize(
    "item", [tokens(D, [9], position=3), tokens(D, [4, 6], position=0)], ids=["gap", "conflict"]
)
def test_a_stream_that_lost_its_place_is_ended(item: pb.WorkerEvent) -> None:
    lifecycle = decoding()
    *aborts, fail = lifecycle.on_event(item, 0.0)
    assert [describe(effect) for effect in aborts] == ["Abort to P", "Abort to D"]
    assert isinstance(fail, Fail)
    assert (fail.error.status, fail.error.code) == (500, "stream_broken")
    assert lifecycle.state is State.FAILED


def wanting_logprobs() -> Lifecycle:
    lifecycle = Lifecycle(make_request(), ROUTER)
    lifecycle.request.sampling.num_logprobs = 0
    lifecycle.enqueue(0.0)
    lifecycle.dispatch(ASSIGNMENT)
    lifecycle.on_event(attached(D), 0.0)
    return lifecycle


def test_logprobs_come_with_their_tokens_once() -> None:
    lifecycle = wanting_logprobs()
    zero, one = pb.TokenLogprobs(logprob=-1.0), pb.TokenLogprobs(logprob=-2.0)
    event = first_token(P, 5)
    event.first_token.logprobs.CopyFrom(zero)
    (first,) = lifecycle.on_event(event, 0.0)
    event = tokens(D, [5, 6])
    event.tokens.logprobs.extend([zero, one])
    (second,) = lifecycle.on_event(event, 0.0)
    assert isinstance(first, Deliver) and first.update.logprobs == (zero,)
    assert isinstance(second, Deliver) and second.update.logprobs == (one,)


def test_a_stream_without_the_logprobs_that_it_wants_is_ended() -> None:
    *_, fail = wanting_logprobs().on_event(tokens(D, [5, 6]), 0.0)
    assert isinstance(fail, Fail)
    assert fail.error.code == "stream_broken"


def test_the_last_update_says_why() -> None:
    (effect,) = decoding().on_event(tokens(D, [5, 6], finish=pb.FINISH_REASON_LENGTH), 0.0)
    assert isinstance(effect, Deliver)
    assert effect.update.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("code", "status", "name"),
    [
        (pb.FAILURE_CODE_PEER_LOST, 503, "worker_lost"),
        (pb.FAILURE_CODE_STALLED, 503, "worker_lost"),
        (pb.FAILURE_CODE_NOT_PARKED, 503, "worker_lost"),
        (pb.FAILURE_CODE_FULL, 503, "overloaded"),
        (pb.FAILURE_CODE_INTEGRITY, 500, "handoff_corrupt"),
        (pb.FAILURE_CODE_INVALID, 500, "worker_error"),
        (pb.FAILURE_CODE_INTERNAL, 500, "worker_error"),
    ],
)
def test_what_a_failure_means_for_the_client(
    code: "pb.FailureCode.ValueType", status: int, name: str
) -> None:
    error = worker_failure(pb.Failed(code=code, message="it broke"))
    assert (error.status, error.code) == (status, name)
    assert (error.retry_after_s is not None) is (status == 503)
    assert "it broke" in error.message


def test_a_prefill_worker_that_has_sealed_is_not_missed() -> None:
    lifecycle = prefill_sent()
    lifecycle.on_event(first_token(P), 0.0)
    lifecycle.on_event(sealed(P), 0.0)
    assert lifecycle.on_worker_lost(P) == []
    assert lifecycle.state is State.HANDOFF
