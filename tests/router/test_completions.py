"""What a valid request becomes for the workers, and what their tokens become for the client."""

from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from scripted_dispatcher import ScriptedDispatcher, updates

from pagewire.router.request import FinishReason, RequestFailed, TokenUpdate
from pagewire.router.tokenizer import Tokenizer

END = 2  # <|im_end|>
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def answer(dispatcher: ScriptedDispatcher, tokenizer: Tokenizer) -> list[int]:
    """The dispatcher will generate these ids, the stop token included."""
    token_ids = [*tokenizer.encode("Hello, w\u00f6rld!"), END]
    dispatcher.script = updates(token_ids, FinishReason.STOP)
    return token_ids


def complete(client: TestClient, **fields: Any) -> Any:
    body = {"model": "smollm2", "prompt": "Once upon", **fields}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def chat(client: TestClient, **fields: Any) -> Any:
    body = {"model": "default", "messages": USER, **fields}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_completion(
    client: TestClient, dispatcher: ScriptedDispatcher, tokenizer: Tokenizer, answer: list[int]
) -> None:
    body = complete(client)
    assert body["id"] == f"cmpl-{dispatcher.requests[0].request_id}"
    assert body["object"] == "text_completion"
    assert body["model"] == "smollm2"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "Hello, w\u00f6rld!",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    num_prompt = len(tokenizer.encode("Once upon"))
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(answer),
        "total_tokens": num_prompt + len(answer),
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert dispatcher.streams[0].cancelled == []


@pytest.mark.parametrize("is_late", [False, True])
def test_cached_tokens_are_reported(
    client: TestClient, dispatcher: ScriptedDispatcher, answer: list[int], is_late: bool
) -> None:
    """Token 0 may be known from the decode worker before the prefill worker's message is here."""
    script = updates(answer, FinishReason.STOP)
    if is_late:
        late = TokenUpdate(position=1, token_ids=(), num_cached_tokens=64)
        dispatcher.script = [script[0], late, *script[1:]]
    else:
        dispatcher.script = [replace(script[0], num_cached_tokens=64), *script[1:]]
    body = complete(client, cache_salt="tenant")
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 64}
    assert body["choices"][0]["text"] == "Hello, w\u00f6rld!"
    assert dispatcher.requests[0].cache_salt == "tenant"
    metrics = client.get("/metrics").text
    assert 'vllm:prefix_cache_hits_total{model_name="smollm2"} 64.0' in metrics
    assert 'pagewire_prefix_cache_queries_total{model_name="smollm2"} ' in metrics


def test_a_chat(client: TestClient, dispatcher: ScriptedDispatcher, answer: list[int]) -> None:
    body = chat(client)
    assert body["id"] == f"chatcmpl-{dispatcher.requests[0].request_id}"
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hello, w\u00f6rld!",
        "refusal": None,
    }
    assert choice["finish_reason"] == "stop"


def test_the_prompt_of_a_chat_is_its_rendered_template(
    client: TestClient, dispatcher: ScriptedDispatcher, tokenizer: Tokenizer, answer: list[int]
) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two<|im_end|>"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    chat(client, messages=messages)
    token_ids = dispatcher.requests[0].token_ids
    shown = tokenizer.backend.decode(token_ids, skip_special_tokens=False)
    assert shown == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\none\ntwo<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert token_ids.count(END) == 2


@pytest.mark.parametrize("prompt", ["a b", ["a b"], [5, 6], [[5, 6]]])
def test_every_form_of_one_prompt(
    client: TestClient,
    dispatcher: ScriptedDispatcher,
    tokenizer: Tokenizer,
    answer: list[int],
    prompt: Any,
) -> None:
    complete(client, prompt=prompt)
    expected = [5, 6] if "a b" not in prompt else tokenizer.encode("a b")
    assert dispatcher.requests[0].token_ids == tuple(expected)


def test_a_long_prompt_is_tokenized_beside_the_loop(
    client: TestClient, dispatcher: ScriptedDispatcher, tokenizer: Tokenizer, answer: list[int]
) -> None:
    prompt = "strawberry " * 900
    complete(client, prompt=prompt)
    assert dispatcher.requests[0].token_ids == tuple(tokenizer.encode(prompt))


def test_default_sampling(
    client: TestClient, dispatcher: ScriptedDispatcher, answer: list[int]
) -> None:
    complete(client)
    chat(client)
    for request in dispatcher.requests:
        assert request.sampling.temperature == 1.0
        assert request.sampling.top_p == 1.0
        assert request.sampling.top_k == 0
        assert list(request.sampling.stop_token_ids) == [END]
        assert 0 < request.queue_deadline < request.deadline
    first, second = dispatcher.requests
    assert first.sampling.max_tokens == 16
    assert second.sampling.max_tokens == 2048 - len(second.token_ids)
    assert first.sampling.seed != second.sampling.seed
    assert first.request_id != second.request_id


def test_the_default_of_max_tokens_fits_the_room(
    client: TestClient, dispatcher: ScriptedDispatcher, answer: list[int]
) -> None:
    complete(client, prompt=[5] * 2040)
    assert dispatcher.requests[0].sampling.max_tokens == 8


@pytest.mark.parametrize(
    ("fields", "sampled"),
    [
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1e-30}, {"temperature": 0.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"top_p": 0.5, "top_k": 20}, {"top_p": 0.5, "top_k": 20}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": 5}, {"seed": 5}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
        ({"min_p": 0.25, "min_tokens": 3}, {"min_p": 0.25, "min_tokens": 3}),
        ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0}),
        ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({}, {"repetition_penalty": 1.0}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"logit_bias": {"5": -100, "49151": 0.5}}, {"logit_bias": {5: -100.0, 49151: 0.5}}),
        ({"logprobs": True}, {"num_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"num_logprobs": 20}),
        ({"ignore_eos": True}, {"stop_token_ids": []}),
        ({"stop_token_ids": [9, 5, 9]}, {"stop_token_ids": [END, 5, 9]}),
        ({"ignore_eos": True, "stop_token_ids": [9]}, {"stop_token_ids": [9]}),
    ],
)
def test_sampling_parameters(
    client: TestClient,
    dispatcher: ScriptedDispatcher,
    answer: list[int],
    fields: dict[str, Any],
    sampled: dict[str, Any],
) -> None:
    chat(client, **fields)
    sampling = dispatcher.requests[0].sampling
    for name, value in sampled.items():
        actual = getattr(sampling, name)
        assert (list(actual) if name == "stop_token_ids" else actual) == value


def test_without_logprobs_the_workers_are_asked_for_none(
    client: TestClient, dispatcher: ScriptedDispatcher, answer: list[int]
) -> None:
    complete(client)
    chat(client, logprobs=False, top_logprobs=0)
    complete(client, logprobs=0)
    asked = [request.sampling.HasField("num_logprobs") for request in dispatcher.requests]
    assert asked == [False, False, True]


def test_a_stop_string_waits_for_min_tokens(client: TestClient, answer: list[int]) -> None:
    whole = complete(client)["choices"][0]["text"]
    assert complete(client, stop="H")["choices"][0]["text"] == ""
    assert complete(client, stop="H", min_tokens=2)["choices"][0]["text"] == whole


def test_a_tiny_top_p_stays_above_zero(
    client: TestClient, dispatcher: ScriptedDispatcher, answer: list[int]
) -> None:
    chat(client, top_p=1e-300)
    assert 0 < dispatcher.requests[0].sampling.top_p < 1e-30


def test_the_newer_name_of_max_tokens_wins(
    client: TestClient, dispatcher: ScriptedDispatcher, answer: list[int]
) -> None:
    chat(client, max_tokens=5, max_completion_tokens=9)
    assert dispatcher.requests[0].sampling.max_tokens == 9


def test_a_stop_string_ends_the_request_at_the_workers(
    client: TestClient, dispatcher: ScriptedDispatcher, answer: list[int]
) -> None:
    body = complete(client, stop=["x", "wör"])
    assert body["choices"][0]["text"] == "Hello, "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["stop_reason"] == "wör"
    assert body["usage"]["completion_tokens"] < len(answer)
    assert len(dispatcher.streams[0].cancelled) == 1


def test_the_length_ends_an_answer(client: TestClient, dispatcher: ScriptedDispatcher) -> None:
    dispatcher.script = updates([40, 41, 42])
    assert complete(client)["choices"][0]["finish_reason"] == "length"


def test_ignored_end_tokens_have_no_text(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = updates([40, END, 41])
    body = complete(client, ignore_eos=True)
    assert len(body["choices"][0]["text"]) == 2
    assert body["usage"]["completion_tokens"] == 3


# --- failures ---------------------------------------------------------------------------------

SATURATED = RequestFailed(
    "All workers are busy; try again later.",
    status=503,
    kind="service_unavailable",
    code="saturated",
    retry_after_s=3,
    details={"queued": 9},
)


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_keeps_its_status_and_retry_after(
    client: TestClient, dispatcher: ScriptedDispatcher, stream: bool
) -> None:
    dispatcher.refusal = SATURATED
    body = {"model": "default", "messages": USER, "stream": stream}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    assert response.json() == {
        "error": {
            "message": "All workers are busy; try again later.",
            "type": "service_unavailable",
            "param": None,
            "code": "saturated",
            "queued": 9,
        }
    }


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_is_an_http_status(
    client: TestClient, dispatcher: ScriptedDispatcher, stream: bool
) -> None:
    dispatcher.script = [SATURATED]
    body = {"model": "default", "messages": USER, "stream": stream}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 503
    assert dispatcher.streams[0].cancelled


def test_a_failure_after_some_tokens_is_no_answer(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = [*updates([40, 41], finish=None), SATURATED]
    response = client.post("/v1/completions", json={"model": "default", "prompt": "x"})
    assert response.status_code == 503


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "script", [[ValueError("/secret/path with a prompt")], updates([40, 41], finish=None)]
)
def test_a_fault_of_ours_is_told_without_its_text(
    client: TestClient, dispatcher: ScriptedDispatcher, script: list[Any], stream: bool
) -> None:
    dispatcher.script = script
    body = {"model": "default", "messages": USER, "stream": stream}
    response = client.post("/v1/chat/completions", json=body)
    if not stream:
        assert response.status_code == 500
    assert '"code":"internal_error"' in response.text
    assert "secret" not in response.text
    assert dispatcher.streams[0].cancelled


# --- the envelope of every response -------------------------------------------------------------


def test_a_harmless_request_id_is_echoed(client: TestClient) -> None:
    response = client.get("/health", headers={"x-request-id": "trace-1.a:b_c"})
    assert response.headers["x-request-id"] == "trace-1.a:b_c"


@pytest.mark.parametrize("label", ["a b", "x" * 129, "<script>", ""])
def test_another_request_id_is_replaced(client: TestClient, label: str) -> None:
    made = client.get("/health", headers={"x-request-id": label}).headers["x-request-id"]
    assert made != label
    assert len(made) == 32


def test_a_request_id_comes_with_errors_too(client: TestClient) -> None:
    assert client.get("/nowhere", headers={"x-request-id": "a"}).headers["x-request-id"] == "a"


def test_two_clients_with_the_same_request_id_are_two_requests(
    client: TestClient, dispatcher: ScriptedDispatcher, answer: list[int]
) -> None:
    for _ in range(2):
        body = {"model": "default", "prompt": "x"}
        client.post("/v1/completions", json=body, headers={"x-request-id": "same"})
    first, second = dispatcher.requests
    assert "same" not in (first.request_id, second.request_id)
    assert first.request_id != second.request_id
