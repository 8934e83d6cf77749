"""Names of attempts, and the bounded memory of those that are over."""

import pytest
from handoff_pair import DECODE, PREFILL, ROUTER, attach_command, route

from pagewire.engine.sampling_params import SamplingParams
from pagewire.proto import worker_pb2 as pb
from pagewire.worker.identity import (
    AttemptKey,
    CommandError,
    finish_reason,
    prefix_hash,
    read_work,
    reply_route,
)
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


def read_sampling(params: pb.SamplingParams) -> SamplingParams:
    body = attach_command([1, 2], params=params).attach
    return read_work(body, vocab_size=100, max_model_len=50)[1][0]


def test_sampling_parameters_of_a_command() -> None:
    params = pb.SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.5,
        top_k=3,
        min_p=0.25,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        logit_bias={7: 1.0, 3: -100.0},
        seed=5,
        stop_token_ids=[9],
        num_logprobs=4,
    )
    assert read_sampling(params) == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.5,
        top_k=3,
        min_p=0.25,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        logit_bias=((3, -100.0), (7, 1.0)),
        seed=5,
        stop_token_ids=frozenset({9}),
        num_logprobs=4,
    )


def test_what_is_absent_is_off() -> None:
    sampling = read_sampling(pb.SamplingParams(max_tokens=3, top_p=1.0))
    assert sampling == SamplingParams(max_tokens=3)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (pb.SamplingParams(logit_bias={100: 1.0}), "logit_bias holds an id outside"),
        (pb.SamplingParams(stop_token_ids=[100]), "stop_token_ids holds an id outside"),
        (pb.SamplingParams(min_tokens=4), "min_tokens is 4"),
        (pb.SamplingParams(repetition_penalty=0.0), "repetition_penalty is 0.0"),
        (pb.SamplingParams(num_logprobs=21), "num_logprobs is 21"),
    ],
)
def test_sampling_parameters_are_checked_again(params: pb.SamplingParams, text: str) -> None:
    params.MergeFrom(pb.SamplingParams(max_tokens=3, top_p=1.0))
    with pytest.raises(CommandError, match=text):
        read_sampling(params)
