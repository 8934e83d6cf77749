"""Names of attempts, and the bounded memory of those that are over."""

import pytest
from handoff_pair import DECODE, PREFILL, ROUTER, route

from pagewire.engine.sampling_params import SamplingParams
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.identity import AttemptKey, finish_reason, prefix_hash, reply_route
from pagewire.worker.ledger import EndedAttempts


def test_an_answer_goes_back() -> None:
    answer = reply_route(route(PREFILL, attempt=3))
    assert answer == pb.Route(request_id="request", attempt=3, sender=PREFILL, receiver=ROUTER)
    assert AttemptKey.of(answer) == ("request", 3)
    assert route(DECODE).receiver == DECODE


def test_the_prefix_hash_depends_on_every_token_and_their_order() -> None:
    hashes = {prefix_hash(tokens) for tokens in ([1, 2], [2, 1], [1], [1, 2, 0], [1, 258])}
    assert len(hashes) == 5
    assert {len(item) for item in hashes} == {16}


@pytest.mark.parametrize(
    ("token", "count", "reason"),
    [
        (5, 1, pb.FINISH_REASON_UNSPECIFIED),
        (5, 3, pb.FINISH_REASON_LENGTH),
        (9, 1, pb.FINISH_REASON_STOP),
        (9, 3, pb.FINISH_REASON_STOP),
    ],
)
def test_finish_reason(token: int, count: int, reason: "pb.FinishReason.ValueType") -> None:
    sampling = SamplingParams(max_tokens=3, stop_token_ids=frozenset({9}))
    assert finish_reason(token, count, sampling) == reason


def test_the_attempts_that_ended_last_are_remembered() -> None:
    ended = EndedAttempts()
    keys = [AttemptKey("request", attempt) for attempt in range(5_000)]
    for key in keys:
        ended.add(key)
    assert keys[-1] in ended
    assert keys[-4_096] in ended
    assert keys[0] not in ended
