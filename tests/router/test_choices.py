"""Several choices of one request: told apart on their way, answered together."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from routing import (
    ROUTER,
    attached,
    failed,
    first_token,
    make_request,
    ready,
    registration,
    tokens,
)
from scripted_dispatcher import ScriptedDispatcher, events, updates

from pagewire.proto import worker_pb2 as pb
from pagewire.router.commands import Assignment
from pagewire.router.dispatch import DispatchCore
from pagewire.router.lifecycle import (
    Deliver,
    Effect,
    Fail,
    Lifecycle,
    SendCommand,
    State,
)
from pagewire.router.request import FinishReason, RequestFailed, TokenUpdate
from pagewire.router.settings import RouterSettings
from pagewire.router.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
END = 2  # <|im_end|>
P = b"p" * 16
D = b"d" * 16
STOP, LENGTH = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH


# --- The lifecycle --------------------------------------------------------------------------------


def prefill_sent(n: int) -> Lifecycle:
    lifecycle = Lifecycle(make_request(n=n), ROUTER)
    lifecycle.enqueue(0.0)
    assignment = Assignment(attempt=1, prefill=P, decode=D, transports=(), ticket=b"t" * 16)
    lifecycle.dispatch(assignment)
    lifecycle.on_event(attached(D), 0.0)
    return lifecycle


def deliveries(effects: list[Effect]) -> list[tuple[int, int, tuple[int, ...], bool]]:
    """(choice, position, token ids, whether it is the last update of the request)."""
    return [
        (effect.update.choice, effect.update.position, effect.update.token_ids, effect.is_last)
        for effect in effects
        if isinstance(effect, Deliver)
    ]


def command_names(effects: list[Effect]) -> list[str | None]:
    return [
        effect.command.WhichOneof("body") for effect in effects if isinstance(effect, SendCommand)
    ]


def test_workers_are_told_how_many() -> None:
    lifecycle = Lifecycle(make_request(n=3), ROUTER)
    lifecycle.enqueue(0.0)
    assignment = Assignment(attempt=1, prefill=P, decode=D, transports=(), ticket=b"t" * 16)
    (attach,) = lifecycle.dispatch(assignment)
    (prefill,) = lifecycle.on_event(attached(D), 0.0)
    assert isinstance(attach, SendCommand) and isinstance(prefill, SendCommand)
    assert attach.command.attach.n == prefill.command.prefill.n == 3


def test_each_choice_has_positions_of_its_own() -> None:
    lifecycle = prefill_sent(2)
    assert deliveries(lifecycle.on_event(first_token(P, 5), 0.0)) == [(0, 0, (5,), False)]
    assert deliveries(lifecycle.on_event(tokens(D, [7, 8], choice=1), 0.0)) == [
        (1, 0, (7, 8), False)
    ]
    assert lifecycle.on_event(first_token(P, 7, choice=1), 0.0) == []
    assert deliveries(lifecycle.on_event(tokens(D, [5, 6]), 0.0)) == [(0, 1, (6,), False)]


def test_the_request_is_done_when_all_choices_are() -> None:
    lifecycle = prefill_sent(2)
    lifecycle.on_event(first_token(P, 5, finish=STOP), 0.0)
    lifecycle.on_event(first_token(P, 7, choice=1), 0.0)
    assert lifecycle.is_live
    repeated = tokens(D, [5], finish=STOP)  # the decode worker says it too
    assert lifecycle.on_event(repeated, 0.0) == []
    last = lifecycle.on_event(tokens(D, [7, 8], choice=1, finish=LENGTH), 0.0)
    assert deliveries(last) == [(1, 1, (8,), True)]
    assert command_names(last) == []
    assert lifecycle.state is State.DONE


def test_when_all_end_at_token_0_both_workers_are_told() -> None:
    lifecycle = prefill_sent(2)
    assert command_names(lifecycle.on_event(first_token(P, 5, finish=LENGTH), 0.0)) == []
    effects = lifecycle.on_event(first_token(P, 7, choice=1, finish=LENGTH), 0.0)
    aborts = [effect.command for effect in effects if isinstance(effect, SendCommand)]
    assert command_names(effects) == ["abort", "abort"]
    assert {command.route.receiver for command in aborts} == {P, D}
    assert lifecycle.state is State.DONE


def test_a_stopped_choice_says_no_more() -> None:
    lifecycle = prefill_sent(2)
    lifecycle.on_event(first_token(P, 5), 0.0)
    (stop,) = lifecycle.stop_choice(0)
    assert isinstance(stop, SendCommand)
    assert stop.command.route.receiver == D
    assert stop.command.stop_choice.choice == 0
    assert lifecycle.stop_choice(0) == []
    assert lifecycle.on_event(tokens(D, [5, 6]), 0.0) == []
    effects = lifecycle.on_event(tokens(D, [7], choice=1, finish=STOP), 0.0)
    assert deliveries(effects) == [(1, 0, (7,), True)]


def test_to_stop_the_last_choice_is_to_cancel() -> None:
    lifecycle = prefill_sent(2)
    lifecycle.on_event(ready(D), 0.0)
    lifecycle.on_event(tokens(D, [5], finish=STOP), 0.0)
    assert command_names(lifecycle.stop_choice(1)) == ["abort", "abort"]
    assert lifecycle.state is State.CANCELLED


def test_one_failure_fails_all_choices() -> None:
    lifecycle = prefill_sent(2)
    lifecycle.on_event(tokens(D, [5], finish=STOP), 0.0)
    *_, fail = lifecycle.on_event(failed(D), 0.0)
    assert isinstance(fail, Fail)


@pytest.mark.parametrize("item", [first_token(P, choice=2), tokens(D, choice=2)])
def test_a_choice_that_was_not_asked_for_breaks_the_stream(item: pb.WorkerEvent) -> None:
    *_, fail = prefill_sent(2).on_event(item, 0.0)
    assert isinstance(fail, Fail)
    assert fail.error.code == "stream_broken"


# --- Capacity -------------------------------------------------------------------------------------


def running_core(num_pages: int = 10) -> DispatchCore:
    core = DispatchCore(incarnation=ROUTER, max_queued=2, make_ticket=lambda: bytes(16))
    core.on_registered(registration("prefill-0", pb.ROLE_PREFILL, incarnation=P), 0.0)
    decode = registration("decode-0", pb.ROLE_DECODE, incarnation=D, num_pages=num_pages)
    core.on_registered(decode, 0.0)
    return core


def projected_pages(core: DispatchCore) -> int:
    member = core.members.get(D)
    assert member is not None
    return member.num_projected_pages


def test_the_pages_of_all_choices_are_projected() -> None:
    """A prompt of one full page and a part; 3 choices with 2 pages each of their own."""
    core = running_core()
    core.submit(make_request(num_prompt_tokens=20, max_tokens=20, n=3), 0.0)
    assert projected_pages(core) == 1 + 3 * 2
    core.on_event(ready(D), 0.0)
    for choice in range(3):
        assert core.stop_choice("request", choice)
    assert projected_pages(core) == 0
    assert core.stop_choice("request", 0) == []


@pytest.mark.parametrize(("n", "fits"), [(4, True), (5, False)])
def test_choices_that_never_fit_are_refused(n: int, fits: bool) -> None:
    core = running_core()
    request = make_request(num_prompt_tokens=20, max_tokens=20, n=n)
    assert (core.max_kv_tokens(num_prompt_tokens=20, n=n) >= 40) is fits
    if fits:
        assert core.submit(request, 0.0)
        return
    with pytest.raises(RequestFailed, match="lower n, which is 5") as refusal:
        core.submit(request, 0.0)
    assert (refusal.value.status, refusal.value.param) == (400, "n")


# --- The API --------------------------------------------------------------------------------------


@pytest.fixture
def answers(dispatcher: ScriptedDispatcher, tokenizer: Tokenizer) -> list[str]:
    """Two answers, word by word in turn; the first is the longer one."""
    texts = ["One two three four.", "Five six."]
    first, second = (
        updates([*tokenizer.encode(text), END], FinishReason.STOP, choice)
        for choice, text in enumerate(texts)
    )
    turns = [each for pair in zip(first, second, strict=False) for each in pair]
    dispatcher.script = [*turns, *first[len(second) :]]
    return texts


def post(client: TestClient, path: str, **fields: Any) -> Any:
    source = {"messages": MESSAGES} if path == CHAT else {"prompt": "Once upon"}
    response = client.post(path, json={"model": "default", **source, **fields})
    assert response.status_code == 200, response.text
    return response


def text_of(path: str, choice: Any) -> str:
    return str(choice["message"]["content"] if path == CHAT else choice["text"])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("best_of", [None, 2])
def test_a_whole_answer(
    client: TestClient,
    dispatcher: ScriptedDispatcher,
    answers: list[str],
    path: str,
    best_of: int | None,
) -> None:
    body = post(client, path, n=2, best_of=best_of).json()
    assert [text_of(path, choice) for choice in body["choices"]] == answers
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "stop"]
    (request,) = dispatcher.requests
    assert request.n == 2
    num_output = sum(
        len(each.token_ids) for each in dispatcher.script if isinstance(each, TokenUpdate)
    )
    assert body["usage"]["completion_tokens"] == num_output
    assert body["usage"]["prompt_tokens"] == len(request.token_ids)
    assert dispatcher.streams[0].cancelled == []


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream(
    client: TestClient, dispatcher: ScriptedDispatcher, answers: list[str], path: str
) -> None:
    response = post(client, path, n=2, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    items = [chunk["choices"][0] for chunk in chunks]
    for index, expected in enumerate(answers):
        mine = [item for item in items if item["index"] == index]
        if path == CHAT:
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(item["delta"].get("content", "") for item in mine) == expected
        else:
            assert "".join(item["text"] for item in mine) == expected
        assert [item["finish_reason"] for item in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == "stop"
    assert (items[0]["index"], items[-1]["index"]) == (0, 0)  # the shorter one ended before


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_its_choice_alone(
    client: TestClient, dispatcher: ScriptedDispatcher, answers: list[str], stream: bool
) -> None:
    response = post(client, COMPLETIONS, n=2, stop=" three", stream=stream)
    if stream:
        items = [each["choices"][0] for each in events(response.text) if each != "[DONE]"]
    else:
        items = response.json()["choices"]
    texts = ["".join(item["text"] for item in items if item["index"] == index) for index in (0, 1)]
    assert texts == ["One two", answers[1]]
    reasons = {item["index"]: item["stop_reason"] for item in items if item["finish_reason"]}
    assert reasons == {0: " three", 1: None}


def test_the_workers_are_told_of_a_choice_that_met_its_stop_string(
    client: TestClient, dispatcher: ScriptedDispatcher, answers: list[str]
) -> None:
    post(client, COMPLETIONS, n=2, stop="Fi")
    (stream,) = dispatcher.streams
    assert stream.stopped == [1]
    assert stream.cancelled == ["a stop string was found"]  # harmless: the others have ended


def test_tokens_of_a_stopped_choice_that_were_on_their_way_do_not_count(
    client: TestClient, dispatcher: ScriptedDispatcher, tokenizer: Tokenizer
) -> None:
    first = updates(tokenizer.encode("a b c d"), FinishReason.LENGTH)
    dispatcher.script = [*first, *updates([40, 41], FinishReason.LENGTH, choice=1)]
    body = post(client, COMPLETIONS, n=2, stop=" b").json()
    assert body["choices"][0]["text"] == "a"
    assert body["usage"]["completion_tokens"] == 2 + 2


def test_logprobs_are_those_of_their_choice(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = [
        TokenUpdate(
            choice=choice,
            position=0,
            token_ids=(40, 41),
            finish_reason=FinishReason.LENGTH,
            logprobs=(pb.TokenLogprobs(logprob=-choice), pb.TokenLogprobs(logprob=-1.5)),
        )
        for choice in (1, 0)
    ]
    choices = post(client, COMPLETIONS, n=2, logprobs=0).json()["choices"]
    assert [each["logprobs"]["token_logprobs"] for each in choices] == [[0.0, -1.5], [-1.0, -1.5]]
    assert [each["logprobs"]["text_offset"] for each in choices] == [[0, 1], [0, 1]]


def test_a_failure_fails_the_whole_answer(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    lost = RequestFailed("The workers are gone.", status=502, kind="server_error", code="lost")
    dispatcher.script = [*updates([40], FinishReason.LENGTH), lost]
    response = client.post(COMPLETIONS, json={"model": "default", "prompt": "x", "n": 2})
    assert response.status_code == 502
    assert dispatcher.streams[0].cancelled == ["it failed"]


def test_metrics_measure_gaps_inside_a_choice(
    client: TestClient, dispatcher: ScriptedDispatcher, answers: list[str]
) -> None:
    post(client, COMPLETIONS, n=2)
    metrics = client.get("/metrics").text
    num_updates = len(dispatcher.script)
    for line in (
        'pagewire_requests_finished_total{finished_reason="stop",model_name="smollm2"} 1.0',
        'pagewire_time_to_first_token_seconds_count{model_name="smollm2"} 1.0',
        f'pagewire_inter_token_latency_seconds_count{{model_name="smollm2"}} {num_updates - 2}.0',
        'pagewire_time_per_output_token_seconds_count{model_name="smollm2"} 2.0',
    ):
        assert line in metrics


def refusal(client: TestClient, path: str = COMPLETIONS, **fields: Any) -> Any:
    source = {"messages": MESSAGES} if path == CHAT else {"prompt": [5] * 10}
    response = client.post(path, json={"model": "default", **source, **fields})
    assert response.status_code == 400
    return response.json()["error"]


def test_choices_must_fit_the_workers_together(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    """Room for 90 tokens behind the prompt, so for 30 in each of 3 choices."""
    dispatcher.capacity = 100
    error = refusal(client, n=3, max_tokens=31)
    assert (error["param"], error["code"]) == ("n", "context_length_exceeded")
    assert "3 choices of 31 tokens" in error["message"]
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (10, 40)
    assert refusal(client, n=3, max_tokens=91)["param"] == "max_tokens"
    dispatcher.capacity = 12
    assert refusal(client, n=3)["param"] == "n"
    assert not dispatcher.requests


def test_without_max_tokens_choices_share_the_room(
    client: TestClient, dispatcher: ScriptedDispatcher, answers: list[str]
) -> None:
    dispatcher.capacity = 1000
    post(client, CHAT, n=2)
    (request,) = dispatcher.requests
    assert request.sampling.max_tokens == (1000 - len(request.token_ids)) // 2


def test_best_of_ranks_nothing(client: TestClient) -> None:
    error = refusal(client, n=2, best_of=3)
    assert (error["param"], error["code"]) == ("best_of", "unsupported_parameter")


@pytest.mark.parametrize("max_n", [0, 17])
def test_the_limit_is_one_that_workers_take(max_n: int) -> None:
    with pytest.raises(ValueError, match=f"max_n is {max_n}"):
        RouterSettings(served_model="m", max_model_len=10, max_n=max_n)
