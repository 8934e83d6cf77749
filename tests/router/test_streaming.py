"""The event stream: its order, its failures, and what happens when the client leaves."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from scripted_dispatcher import AsgiCall, ScriptedDispatcher, events, updates

from pagewire.router.request import FinishReason, RequestFailed
from pagewire.router.settings import RouterSettings
from pagewire.router.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CHAT_BODY = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "stream": True}
COMPLETION_BODY = {"model": "default", "prompt": "hi", "stream": True}
END = 2

LOST = RequestFailed("The workers are gone.", status=502, kind="server_error", code="lost")

Scenario = Callable[[], Coroutine[Any, Any, None]]


async def forever() -> None:
    await asyncio.Event().wait()


def stream(client: TestClient, path: str, body: dict[str, Any]) -> list[Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]
    return events(response.text)


@pytest.fixture
def answer(dispatcher: ScriptedDispatcher, tokenizer: Tokenizer) -> str:
    text = "Hello \U0001f9d9, wörld!"
    dispatcher.script = updates([*tokenizer.encode(text), END], FinishReason.STOP)
    return text


def test_the_events_of_a_chat(
    client: TestClient, dispatcher: ScriptedDispatcher, answer: str
) -> None:
    *chunks, done = stream(client, CHAT, CHAT_BODY)
    assert done == "[DONE]"
    assert {(each["id"], each["created"], each["object"]) for each in chunks} == {
        (chunks[0]["id"], chunks[0]["created"], "chat.completion.chunk")
    }
    assert "usage" not in chunks[0]
    choices = [each["choices"][0] for each in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert not any("role" in each["delta"] for each in choices[1:])
    texts = [each["delta"]["content"] for each in choices[1:-1]]
    assert "".join(texts) == answer
    assert all(texts)
    assert choices[-1]["delta"] == {}
    assert [each["finish_reason"] for each in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert dispatcher.streams[0].cancelled == []


def test_the_events_of_a_completion(client: TestClient, answer: str) -> None:
    *chunks, done = stream(client, COMPLETIONS, COMPLETION_BODY)
    assert done == "[DONE]"
    choices = [each["choices"][0] for each in chunks]
    assert "".join(each["text"] for each in choices) == answer
    assert [each["finish_reason"] for each in choices] == [None] * (len(choices) - 1) + ["stop"]


@pytest.mark.parametrize(("path", "body"), [(CHAT, CHAT_BODY), (COMPLETIONS, COMPLETION_BODY)])
def test_the_usage_comes_last(
    client: TestClient, dispatcher: ScriptedDispatcher, path: str, body: dict[str, Any]
) -> None:
    dispatcher.script = updates([40, 41])
    body = body | {"stream_options": {"include_usage": True}}
    *chunks, usage, done = stream(client, path, body)
    assert done == "[DONE]"
    assert all(each["usage"] is None for each in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2
    assert usage["usage"]["prompt_tokens"] == len(dispatcher.requests[0].token_ids)


def test_a_stop_string_is_never_seen(
    client: TestClient, dispatcher: ScriptedDispatcher, answer: str
) -> None:
    *chunks, _ = stream(client, COMPLETIONS, COMPLETION_BODY | {"stop": ", wör"})
    assert "".join(each["choices"][0]["text"] for each in chunks) == "Hello \U0001f9d9"
    assert chunks[-1]["choices"][0]["stop_reason"] == ", wör"
    assert len(dispatcher.streams[0].cancelled) == 1


def test_a_failure_after_the_first_token_is_an_event(
    client: TestClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = [*updates([40], finish=None), LOST]
    *_, error, done = stream(client, CHAT, CHAT_BODY)
    assert error["error"]["code"] == "lost"
    assert done == "[DONE]"
    assert dispatcher.streams[0].cancelled


# --- timing, without a clock ----------------------------------------------------------------------


def call(
    app: FastAPI, path: str, body: dict[str, Any], script: Callable[[AsgiCall], Awaitable[None]]
) -> None:
    async def run() -> None:
        await script(AsgiCall(app, path, body))

    asyncio.run(run())


def test_comments_keep_a_silent_stream_open(
    make_app: Callable[[RouterSettings], FastAPI], dispatcher: ScriptedDispatcher
) -> None:
    proceed = asyncio.Event()
    dispatcher.script = [proceed.wait, *updates([40])]
    settings = RouterSettings(served_model="smollm2", max_model_len=2048, keep_alive_s=0.001)

    async def scenario(request: AsgiCall) -> None:
        assert (await request.next_message())["status"] == 200
        for _ in range(3):
            assert (await request.next_message())["body"] == b": keep-alive\n\n"
        proceed.set()
        await request.finished()
        *chunks, done = events(request.body.decode())
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert done == "[DONE]"

    call(make_app(settings), CHAT, CHAT_BODY, scenario)


def test_a_failure_after_a_comment_is_an_event(
    make_app: Callable[[RouterSettings], FastAPI], dispatcher: ScriptedDispatcher
) -> None:
    proceed = asyncio.Event()
    dispatcher.script = [proceed.wait, LOST]
    settings = RouterSettings(served_model="smollm2", max_model_len=2048, keep_alive_s=0.001)

    async def scenario(request: AsgiCall) -> None:
        await request.next_message()
        await request.next_message()
        proceed.set()
        await request.finished()
        error, done = events(request.body.decode())
        assert (error["error"]["code"], done) == ("lost", "[DONE]")

    call(make_app(settings), CHAT, CHAT_BODY, scenario)


def test_tokens_are_sent_as_they_come(app: FastAPI, dispatcher: ScriptedDispatcher) -> None:
    proceed = asyncio.Event()
    dispatcher.script = [*updates([40], finish=None), proceed.wait, *updates([41])]

    async def scenario(request: AsgiCall) -> None:
        assert (await request.next_message())["status"] == 200
        (first,) = events((await request.next_message())["body"].decode())
        assert first["choices"][0]["text"] == "8"
        assert not request.done.done()
        proceed.set()
        await request.finished()

    call(app, COMPLETIONS, COMPLETION_BODY, scenario)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_client_that_leaves_cancels_the_request(
    app: FastAPI, dispatcher: ScriptedDispatcher, path: str, stream: bool, num_tokens: int
) -> None:
    reached = asyncio.Event()

    async def reach() -> None:
        reached.set()

    dispatcher.script = [*updates([40] * num_tokens, finish=None), reach, forever]
    body = (CHAT_BODY if path == CHAT else COMPLETION_BODY) | {"stream": stream}

    async def scenario(request: AsgiCall) -> None:
        await reached.wait()
        assert dispatcher.streams[0].cancelled == []
        request.disconnect()
        await request.finished()
        assert dispatcher.streams[0].cancelled == ["the client is gone"]

    call(app, path, body, scenario)


def test_a_reader_that_stops_is_given_up(
    make_app: Callable[[RouterSettings], FastAPI], dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = [*updates([40], finish=None), forever]
    settings = RouterSettings(served_model="smollm2", max_model_len=2048, send_timeout_s=0.01)

    async def scenario(request: AsgiCall) -> None:
        request.hold_sends = asyncio.Event()
        await request.finished()
        assert dispatcher.streams[0].cancelled == ["the client is gone"]

    call(make_app(settings), CHAT, CHAT_BODY, scenario)


def test_a_cancelled_server_cancels_the_request(
    app: FastAPI, dispatcher: ScriptedDispatcher
) -> None:
    reached = asyncio.Event()

    async def reach() -> None:
        reached.set()

    dispatcher.script = [reach, forever]

    async def scenario(request: AsgiCall) -> None:
        await reached.wait()
        request.done.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request.finished()
        assert len(dispatcher.streams[0].cancelled) == 1

    call(app, CHAT, CHAT_BODY, scenario)


@given(
    tokens=st.lists(st.integers(0, 300), max_size=5),
    ending=st.sampled_from(["stop", "length", "failure", "fault", "early", "leave"]),
    stop=st.sampled_from([[], ["a"], ["zz"]]),
    streamed=st.booleans(),
)
def test_a_request_ends_by_its_last_token_or_is_cancelled(
    tokenizer: Tokenizer,
    app_and_dispatcher: tuple[FastAPI, ScriptedDispatcher],
    tokens: list[int],
    ending: str,
    stop: list[str],
    streamed: bool,
) -> None:
    app, dispatcher = app_and_dispatcher
    reached = asyncio.Event()

    async def leave() -> None:
        reached.set()
        await forever()

    endings: dict[str, list[Any]] = {
        "stop": updates([END], FinishReason.STOP),
        "length": updates([40]),
        "failure": [LOST],
        "fault": [ZeroDivisionError()],
        "early": [],
        "leave": [leave],
    }
    dispatcher.script = [*updates(tokens, finish=None), *endings[ending]]
    body = COMPLETION_BODY | {"stream": streamed, "stop": stop}

    async def scenario(request: AsgiCall) -> None:
        left = asyncio.create_task(reached.wait())
        await asyncio.wait({left, request.done}, return_when=asyncio.FIRST_COMPLETED)
        request.disconnect()
        await request.finished()
        left.cancel()

    call(app, COMPLETIONS, body, scenario)
    finished = ending in ("stop", "length")
    cancelled = len(dispatcher.streams[-1].cancelled)
    assert cancelled <= 1
    assert finished or cancelled == 1
