"""Everything a client can get wrong: the status, the parameter that is named, nothing submitted."""

import json
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from scripted_dispatcher import ScriptedDispatcher, updates

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
NAN, INFINITY = float("nan"), float("inf")

# Refused values by the parameter that the answer must name; first those of both endpoints.
REFUSED: dict[str, list[Any]] = {
    "model": [None, 1, True, [], "\ud800"],
    "max_tokens": [0, -1, 1.5, "5", True, NAN, 10**9, 10**4000, [1]],
    "temperature": [-0.1, 2.1, NAN, INFINITY, -INFINITY, True, "1", {}],
    "top_p": [0, -1, 1.1, NAN, False, "x"],
    "top_k": [-2, 2**31, 1.5, True, NAN],
    "seed": [2**64, -(2**63) - 1, 1.5, "x", True],
    "stop": ["", [""], ["x"] * 17, "x" * 257, 5, {"a": 1}],
    "stop[0]": [[5], "\udc00"],
    "stop[1]": [["x", None]],
    "stop_token_ids": [[49_152], [-1], [2**40], [1] * 129, "1", 1],
    "stop_token_ids[0]": [[True], [1.5], ["1"]],
    "ignore_eos": [1, "true", []],
    "stream": [1, "true", {}],
    "stream_options": [{}, {"include_usage": True}, 5, []],
    "stream_options.include_usage": [{"include_usage": 1}],
    "stream_options.continuous_usage_stats": [{"continuous_usage_stats": True}],
    "n": [0, 17, -1, True, "1", 1.5, 10**12],
    "best_of": [0, 2, True, "1"],
    "presence_penalty": [-2.1, 2.1, NAN, "0", False],
    "frequency_penalty": [-2.1, 2.1, INFINITY, "0", True],
    "repetition_penalty": [0, -1, 0.001, 101, NAN, "1", True],
    "min_p": [-0.1, 1.1, NAN, "0", False],
    "min_tokens": [-1, 2049, 1.5, "1", True],
    "logit_bias": [
        *([], 5, "x", {"x": 1}, {"": 1}, {"-1": 1}, {"1.5": 1}, {"9" * 5000: 1}, {"49152": 1}),
        *({"1": 1, "01": 2}, {str(token): 1 for token in range(301)}),
    ],
    "logit_bias[5]": [{"5": 100.1}, {"5": -101}, {"5": NAN}, {"5": "1"}, {"5": True}, {"5": None}],
    "prompt_logprobs": [1],
    "response_format": [{"type": "json_object"}, {}, "text"],
    "guided_json": [{}],
    "structured_outputs": [{"json": {}}],
    "include_stop_str_in_output": [True],
    "skip_special_tokens": [False],
    "priority": [-101, 101, 1.5, "1", True],
    "cache_salt": [5, True, ["x"], "x" * 129, "a@b", "a/b", "a\\b", "a\0b", "\ud800"],
    "ledger": [1, "true", {}, []],
    "kv_transfer_params": [{}],
    "bootstrap_room": [1],
}

REFUSED_CONTENT: list[Any] = [
    None,
    5,
    True,
    {"type": "text", "text": "x"},
    "\ud83d",
    ["x"],
    [{}],
    [{"type": "text"}],
    [{"type": "text", "text": 5}],
    [{"type": 5}],
    [{"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}],
    [{"type": "input_audio", "input_audio": {}}],
]

REFUSED_CHAT: dict[str, list[Any]] = {
    "messages": [None, [], "hi", {}, 5],
    "messages[0]": [["hi"], [None], [[]]],
    "messages[0].role": [
        [{"content": "x"}],
        *([{"role": role, "content": "x"}] for role in ("tool", "function", "root", 1, None)),
    ],
    "messages[0].content": [
        [{"role": "user"}],
        *([{"role": "user", "content": content}] for content in REFUSED_CONTENT),
    ],
    "messages[1].tool_calls": [
        [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [1]}],
    ],
    "max_completion_tokens": [0, 10**6],
    "logprobs": [1, 5, "true"],
    "top_logprobs": [5, -1, 21, 1.5, True],
    "tools": [[], [{"type": "function"}]],
    "tool_choice": ["auto", "required", {}],
    "functions": [[]],
    "modalities": [["audio"]],
    "reasoning_effort": ["high"],
    "chat_template": ["{{ x }}"],
    "chat_template_kwargs": [{"x": 1}],
    "add_generation_prompt": [False],
    "continue_final_message": [True],
}

REFUSED_COMPLETION: dict[str, list[Any]] = {
    "prompt": [
        *(None, "", [], 5, True, {}, [""], [None], [[]], "\ud800"),
        *(["a", "b"], [[1], [2]], [1, "a"], ["a", 1], [[1], "a"]),
        *([-1], [49_152], [1.5], [True], [2**70], [[49_152]]),
    ],
    "logprobs": [-1, 21, 1.5, True, "1"],
    "echo": [True],
    "suffix": ["x"],
    "prompt_embeds": ["x"],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(param, value) for param, values in table.items() for value in values]


@pytest.fixture
def dispatcher() -> ScriptedDispatcher:
    dispatcher = ScriptedDispatcher()
    dispatcher.script = updates([1])
    return dispatcher


def post(client: TestClient, path: str, body: Any) -> Any:
    # Not by the client's own encoder, which refuses NaN and lone surrogates.
    text = json.dumps(body)
    return client.post(path, content=text, headers={"content-type": "application/json"})


def assert_refused(
    response: Any, dispatcher: ScriptedDispatcher, status: int, param: str | None
) -> dict[str, Any]:
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    error: dict[str, Any] = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith(".")
    assert len(response.content) < 600
    assert not dispatcher.requests
    return error


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("param", "value"), cases(REFUSED))
def test_common_parameters(
    client: TestClient, dispatcher: ScriptedDispatcher, path: str, param: str, value: Any
) -> None:
    name = param.partition(".")[0].partition("[")[0]
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    body = {"model": "default", **prompt, name: value}
    if "." in param:
        body["stream"] = True
    assert_refused(post(client, path, body), dispatcher, 400, param)


@pytest.mark.parametrize(("param", "value"), cases(REFUSED_CHAT))
def test_chat_parameters(
    client: TestClient, dispatcher: ScriptedDispatcher, param: str, value: Any
) -> None:
    name = param.partition("[")[0]
    body = {"model": "default", "messages": MESSAGES, name: value}
    assert_refused(post(client, CHAT, body), dispatcher, 400, param)


@pytest.mark.parametrize(("param", "value"), cases(REFUSED_COMPLETION))
def test_completion_parameters(
    client: TestClient, dispatcher: ScriptedDispatcher, param: str, value: Any
) -> None:
    body = {"model": "default", "prompt": "hi", param: value}
    assert_refused(post(client, COMPLETIONS, body), dispatcher, 400, param)


@pytest.mark.parametrize(
    "neutral",
    [
        {"n": 1, "best_of": None, "logprobs": None, "presence_penalty": 0, "min_p": 0.0},
        {"frequency_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}},
        {"top_k": -1, "seed": -1, "stop": None, "temperature": None, "repetition_penalty": 1.0},
        {"user": "me", "metadata": {"a": 1}, "of_the_future": [{"deep": []}]},
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_neutral_and_unknown_values_are_accepted(
    client: TestClient, dispatcher: ScriptedDispatcher, path: str, neutral: dict[str, Any]
) -> None:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    assert post(client, path, {"model": "default", **prompt, **neutral}).status_code == 200
    assert len(dispatcher.requests) == 1


def test_neutral_values_of_chat_are_accepted(client: TestClient) -> None:
    body = {
        "model": "default",
        "messages": [*MESSAGES, {"role": "assistant", "content": "x", "tool_calls": None}],
        "logprobs": False,
        "top_logprobs": 0,
        "tools": None,
        "tool_choice": "none",
        "modalities": ["text"],
    }
    assert post(client, CHAT, body).status_code == 200


@pytest.mark.parametrize("model", ["other", "", "default/x", "x" * 5000])
def test_an_unknown_model(client: TestClient, dispatcher: ScriptedDispatcher, model: str) -> None:
    body = {"model": model, "messages": MESSAGES}
    error = assert_refused(post(client, CHAT, body), dispatcher, 404, "model")
    assert error["code"] == "model_not_found"


def test_a_prompt_that_is_too_long(client: TestClient, dispatcher: ScriptedDispatcher) -> None:
    body = {"model": "default", "prompt": [5] * 2048}
    error = assert_refused(post(client, COMPLETIONS, body), dispatcher, 400, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (2048, 2048)
    body = {"model": "default", "messages": [{"role": "user", "content": "hi " * 3000}]}
    error = assert_refused(post(client, CHAT, body), dispatcher, 400, "messages")
    assert error["code"] == "context_length_exceeded"
    assert error["n_prompt_tokens"] > 3000


@pytest.mark.parametrize(("capacity", "room"), [(0, 2038), (100, 90), (5000, 2038)])
def test_prompt_and_output_must_fit_model_and_workers(
    client: TestClient, dispatcher: ScriptedDispatcher, capacity: int, room: int
) -> None:
    dispatcher.capacity = capacity
    body = {"model": "default", "prompt": [5] * 10, "max_tokens": room + 1}
    error = assert_refused(post(client, COMPLETIONS, body), dispatcher, 400, "max_tokens")
    assert error["code"] == "context_length_exceeded"
    assert str(room) in error["message"]
    assert post(client, COMPLETIONS, body | {"max_tokens": room}).status_code == 200


def test_a_field_with_thousands_of_faults_gets_a_short_answer(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    body = {"model": "default", "messages": [{"role": 1}] * 10_000}
    assert_refused(post(client, CHAT, body), dispatcher, 400, "messages[0].role")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"model": }',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        '{"model": "default"}'.encode("utf-16"),
    ],
)
def test_bodies_that_are_no_json_object(
    client: TestClient, dispatcher: ScriptedDispatcher, content: bytes
) -> None:
    headers = {"content-type": "application/json"}
    response = client.post(CHAT, content=content, headers=headers)
    assert assert_refused(response, dispatcher, 400, None)["code"] == "invalid_json"


def test_an_endless_integer(client: TestClient, dispatcher: ScriptedDispatcher) -> None:
    content = f'{{"model": "default", "prompt": "x", "max_tokens": {"9" * 100_000}}}'
    headers = {"content-type": "application/json"}
    response = client.post(COMPLETIONS, content=content, headers=headers)
    assert_refused(response, dispatcher, 400, "max_tokens")


def test_a_body_above_the_limit(client: TestClient, dispatcher: ScriptedDispatcher) -> None:
    def chunks() -> Any:  # sent without a Content-Length
        for _ in range(5):
            yield b"x" * 1024 * 1024

    headers = {"content-type": "application/json"}
    for content in (b"x" * (4 * 1024 * 1024 + 1), chunks()):
        response = client.post(CHAT, content=content, headers=headers)
        assert assert_refused(response, dispatcher, 413, None)["code"] == "body_too_large"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {},
    ],
)
def test_other_media(
    client: TestClient, dispatcher: ScriptedDispatcher, headers: dict[str, str]
) -> None:
    response = client.post(CHAT, content=b"{}", headers=headers)
    assert assert_refused(response, dispatcher, 415, None)["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("POST", "/v1/unknown", 404, "not_found"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("POST", "/v1/embeddings", 501, "not_implemented"),
    ],
)
def test_routes(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    if status == 405:
        assert response.headers["allow"]


def test_a_chat_without_a_template(
    dispatcher: ScriptedDispatcher, app_without_template: FastAPI
) -> None:
    client = TestClient(app_without_template)
    response = post(client, CHAT, {"model": "default", "messages": MESSAGES})
    error = assert_refused(response, dispatcher, 400, "messages")
    assert "/v1/completions" in error["message"]
