"""The official client against a real server on a socket."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import openai
import pytest
import uvicorn
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam
from scripted_dispatcher import ScriptedDispatcher, updates

from pagewire.proto import worker_pb2 as pb
from pagewire.router.app import create_app
from pagewire.router.chat import ChatTemplate
from pagewire.router.request import FinishReason, RequestFailed, TokenUpdate
from pagewire.router.settings import RouterSettings
from pagewire.router.tokenizer import Tokenizer

ANSWER = "Grüße \U0001f9d9 from here."
END = 2


@pytest.fixture(scope="module")
def served() -> ScriptedDispatcher:
    return ScriptedDispatcher()


@pytest.fixture(scope="module")
def base_url(served: ScriptedDispatcher, tokenizer: Tokenizer) -> Iterator[str]:
    source = tokenizer.config.chat_template
    assert source is not None
    app = create_app(
        dispatcher=served,
        tokenizer=tokenizer,
        chat_template=ChatTemplate(source, tokenizer.config, max_chars=200_000),
        settings=RouterSettings(served_model="smollm2", max_model_len=2048),
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts from here on
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(base_url: str, served: ScriptedDispatcher, tokenizer: Tokenizer) -> Iterator[OpenAI]:
    served.refusal = None
    served.script = updates([*tokenizer.encode(ANSWER), END], FinishReason.STOP)
    with OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    response = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "hi"}], temperature=0
    )
    assert response.choices[0].message.content == ANSWER
    assert response.choices[0].finish_reason == "stop"
    assert response.usage is not None
    assert response.usage.total_tokens > response.usage.completion_tokens


def test_streamed_chat(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None


def test_the_stream_helper_accumulates(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="default", messages=[{"role": "user", "content": "hi"}]
    ) as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == ANSWER


def test_completion(client: OpenAI) -> None:
    response = client.completions.create(
        model="default", prompt="Once", max_tokens=20, stop=" from"
    )
    assert response.choices[0].text == "Grüße \U0001f9d9"


def test_streamed_completion(client: OpenAI) -> None:
    stream = client.completions.create(model="default", prompt="Once", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == ANSWER


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("default").id == "smollm2"


def test_errors_are_the_typed_exceptions(client: OpenAI, served: ScriptedDispatcher) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="default", prompt="x", temperature=3)
    assert bad.value.param == "temperature"
    served.refusal = RequestFailed("Too many.", status=429, kind="rate_limit_error", code="quota")
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="default", prompt="x", stream=True)


def test_a_failure_in_the_stream_is_raised(client: OpenAI, served: ScriptedDispatcher) -> None:
    lost = RequestFailed("The workers are gone.", status=502, kind="server_error", code="lost")
    served.script = [*updates([40], finish=None), lost]
    stream = client.completions.create(model="default", prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="The workers are gone"):
        list(stream)


def test_a_closed_connection_cancels_the_request(
    client: OpenAI, served: ScriptedDispatcher
) -> None:
    cancelled = threading.Event()

    async def until_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    served.script = [*updates([40], finish=None), until_cancelled]
    stream = client.completions.create(model="default", prompt="x", stream=True)
    assert next(iter(stream)).choices[0].text == "8"
    stream.close()
    assert cancelled.wait(timeout=20)


def test_logprobs_whole_and_streamed(client: OpenAI, served: ScriptedDispatcher) -> None:
    served.script = [
        TokenUpdate(
            position=0,
            token_ids=(40,),
            finish_reason=FinishReason.LENGTH,
            logprobs=(pb.TokenLogprobs(logprob=-1.0, top_token_ids=[40], top_logprobs=[-1.0]),),
        )
    ]
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(
        model="default", messages=messages, logprobs=True, top_logprobs=1
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [(each.token, each.logprob) for each in logprobs.content] == [("8", -1.0)]
    stream = client.chat.completions.create(
        model="default", messages=messages, logprobs=True, top_logprobs=1, stream=True
    )
    streamed = [
        entry
        for chunk in stream
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [entry.model_dump() for entry in streamed] == [
        entry.model_dump() for entry in logprobs.content
    ]
    completion = client.completions.create(model="default", prompt="x", logprobs=1)
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.token_logprobs == [-1.0]


@pytest.fixture
def two_answers(served: ScriptedDispatcher, tokenizer: Tokenizer) -> list[str]:
    texts = [ANSWER, "Another one."]
    scripts = [
        updates([*tokenizer.encode(text), END], FinishReason.STOP, choice)
        for choice, text in enumerate(texts)
    ]
    served.script = [each for script in scripts for each in script]
    return texts


def test_several_choices(client: OpenAI, two_answers: list[str]) -> None:
    response = client.completions.create(model="default", prompt="Once", n=2)
    assert [choice.text for choice in response.choices] == two_answers
    assert [choice.index for choice in response.choices] == [0, 1]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="default", prompt="Once", n=17)
    assert refusal.value.param == "n"


def test_several_streamed_choices(client: OpenAI, two_answers: list[str]) -> None:
    with client.chat.completions.stream(
        model="default", messages=[{"role": "user", "content": "hi"}], n=2
    ) as stream:
        completion = stream.get_final_completion()
    assert [choice.message.content for choice in completion.choices] == two_answers
    assert [choice.finish_reason for choice in completion.choices] == ["stop", "stop"]
