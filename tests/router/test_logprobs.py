"""Logprobs in both forms of the API, whole and streamed, and as the official client reads them."""

from collections.abc import Sequence
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from scripted_dispatcher import ScriptedDispatcher, events, updates

from pagewire.proto import worker_pb2 as pb
from pagewire.router.logprobs import ChatLogprobs, CompletionLogprobs, TokenLogprob
from pagewire.router.request import FinishReason, TokenUpdate
from pagewire.router.tokenizer import Tokenizer

END = 2  # <|im_end|>
TEXT = "Hello, w\u00f6rld \U0001f9d9!"
USER = [{"role": "user", "content": "hi"}]


def with_logprobs(token_ids: Sequence[int]) -> list[TokenUpdate]:
    """The sampled token and the end token as the most likely ones, of different probability."""
    script = updates(token_ids, FinishReason.STOP)
    return [
        TokenUpdate(
            position=update.position,
            token_ids=update.token_ids,
            finish_reason=update.finish_reason,
            logprobs=(
                pb.TokenLogprobs(
                    logprob=-0.5 - update.position,
                    top_token_ids=[update.token_ids[0], END],
                    top_logprobs=[-0.5 - update.position, -20.0],
                ),
            ),
        )
        for update in script
    ]


@pytest.fixture
def answer(dispatcher: ScriptedDispatcher, tokenizer: Tokenizer) -> list[int]:
    token_ids = tokenizer.encode(TEXT)
    dispatcher.script = with_logprobs([*token_ids, END])
    return token_ids


def post(client: TestClient, path: str, **fields: Any) -> Any:
    response = client.post(path, json={"model": "default", **fields})
    assert response.status_code == 200, response.text
    return events(response.text)[:-1] if fields.get("stream") else response.json()


def test_a_chat(client: TestClient, tokenizer: Tokenizer, answer: list[int]) -> None:
    body = post(client, "/v1/chat/completions", messages=USER, logprobs=True, top_logprobs=2)
    logprobs = ChatCompletion.model_validate(body).choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [entry.logprob for entry in logprobs.content] == [-0.5 - i for i in range(len(answer))]
    data = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert data.decode() == TEXT
    first = logprobs.content[0]
    assert first.token == "Hello"
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [
        ("Hello", -0.5),
        ("<|im_end|>", -20.0),
    ]


def test_a_streamed_chat_has_the_same(client: TestClient, answer: list[int]) -> None:
    asked: dict[str, Any] = {"messages": USER, "logprobs": True, "top_logprobs": 2}
    whole = post(client, "/v1/chat/completions", **asked)
    chunks = post(client, "/v1/chat/completions", **asked, stream=True)
    content = []
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
        content += (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    assert content == whole["choices"][0]["logprobs"]["content"]


def test_a_completion(client: TestClient, tokenizer: Tokenizer, answer: list[int]) -> None:
    body = post(client, "/v1/completions", prompt="x", logprobs=1)
    logprobs = Completion.model_validate(body).choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset
    assert logprobs.tokens[0] == "Hello"
    assert logprobs.token_logprobs == [-0.5 - i for i in range(len(answer))]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"Hello": -0.5, "<|im_end|>": -20.0}
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert "\ufffd" in token or TEXT[offset:].startswith(token)


def test_a_streamed_completion_has_the_same(client: TestClient, answer: list[int]) -> None:
    whole = post(client, "/v1/completions", prompt="x", logprobs=1)
    chunks = post(client, "/v1/completions", prompt="x", logprobs=1, stream=True)
    pieces = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    for name, values in whole["choices"][0]["logprobs"].items():
        assert [value for piece in pieces for value in piece[name]] == values


@pytest.mark.parametrize("stream", [False, True])
def test_held_back_text_does_not_lose_logprobs(
    client: TestClient, answer: list[int], stream: bool
) -> None:
    asked: dict[str, Any] = {"prompt": "x", "logprobs": 0, "stop": "!?", "stream": stream}
    body = post(client, "/v1/completions", **asked)
    choices = [each["choices"][0] for each in (body if stream else [body])]
    assert "".join(choice["text"] for choice in choices) == TEXT
    tokens = [t for choice in choices if choice["logprobs"] for t in choice["logprobs"]["tokens"]]
    assert len(tokens) == len(answer)


def test_a_token_without_probability_stays_json() -> None:
    values = pb.TokenLogprobs(
        logprob=float("-inf"), top_token_ids=[65], top_logprobs=[float("-inf")]
    )
    token = TokenLogprob(token_id=65, values=values)
    chat = ChatLogprobs(lambda token_id: bytes([token_id]))([token])
    assert chat["content"][0]["logprob"] == -9999.0
    completion = CompletionLogprobs(lambda token_id: bytes([token_id]))([token])
    assert completion["top_logprobs"] == [{"A": -9999.0}]
