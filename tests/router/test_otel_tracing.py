"""Traces of requests: one each, continued from the client's, with nothing of what it wrote."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from scripted_dispatcher import ScriptedDispatcher, updates

from pagewire.router.app import create_app
from pagewire.router.chat import ChatTemplate
from pagewire.router.otel_tracing import OtelTracing
from pagewire.router.request import RequestFailed
from pagewire.router.settings import RouterSettings
from pagewire.router.time_ledger import Part
from pagewire.router.tokenizer import Tokenizer

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=opaque"}
SECRET = "a prompt that nobody else may read"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(
    exporter: InMemorySpanExporter, dispatcher: ScriptedDispatcher, tokenizer: Tokenizer
) -> TestClient:
    first, *others = updates([5, 6, 7])
    times = {Part.QUEUE: 1e-6, Part.PREFILL: 1e-6, Part.DECODE: 1e-6}
    dispatcher.script = [replace(first, times=times, num_cached_tokens=1), *others]
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    source = tokenizer.config.chat_template
    assert source is not None
    app = create_app(
        dispatcher=dispatcher,
        tokenizer=tokenizer,
        chat_template=ChatTemplate(source, tokenizer.config, max_chars=200_000),
        settings=RouterSettings(served_model="smollm2", max_model_len=2048),
        tracing=OtelTracing(tracer=provider.get_tracer("test"), model="smollm2"),
    )
    return TestClient(app)


def complete(client: TestClient, headers: dict[str, str] | None = None, **fields: Any) -> int:
    body = {"model": "smollm2", "prompt": SECRET, "cache_salt": "a tenant's secret", **fields}
    response = client.post("/v1/completions", json=body, headers=headers or {})
    return response.status_code


def whole(spans: Sequence[ReadableSpan]) -> ReadableSpan:
    (found,) = [span for span in spans if span.kind is SpanKind.SERVER]
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_trace_that_continues_the_clients(
    client: TestClient, exporter: InMemorySpanExporter, stream: bool
) -> None:
    assert complete(client, SAMPLED, stream=stream) == 200
    spans = exporter.get_finished_spans()
    request = whole(spans)
    assert request.context is not None and request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT_ID
    assert request.context.trace_state.get("vendor") == "opaque"
    children = [span for span in spans if span is not request]
    assert [span.name for span in children] == ["preprocess", "queue", "prefill", "decode"]
    for span in children:
        assert span.parent is not None and span.parent.span_id == request.context.span_id
    assert {f"{span.context.trace_id:032x}" for span in spans if span.context} == {TRACE_ID}


def test_the_request_says_what_it_was_in_the_words_of_the_conventions(
    client: TestClient, exporter: InMemorySpanExporter, dispatcher: ScriptedDispatcher
) -> None:
    complete(client)
    request = whole(exporter.get_finished_spans())
    (submitted,) = dispatcher.requests
    assert request.name == "text_completion smollm2"
    assert request.status.status_code is StatusCode.UNSET
    assert dict(request.attributes or {}) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "pagewire",
        "gen_ai.request.model": "smollm2",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": len(submitted.token_ids),
        "gen_ai.usage.cache_read.input_tokens": 1,
        "gen_ai.usage.output_tokens": 3,
        "pagewire.request_id": submitted.request_id,
        "pagewire.outcome": "length",
    }


def test_a_conversation_is_a_chat(client: TestClient, exporter: InMemorySpanExporter) -> None:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": SECRET}]}
    client.post("/v1/chat/completions", json=body)
    assert whole(exporter.get_finished_spans()).name == "chat smollm2"


def test_nothing_that_the_client_wrote_is_in_its_spans(
    client: TestClient, exporter: InMemorySpanExporter
) -> None:
    key = {"Authorization": "Bearer a-key", "X-Request-Id": "a-label", **SAMPLED}
    complete(client, key, user="a-user", stop=["a-stop-string"])
    text = " ".join(span.to_json() for span in exporter.get_finished_spans())
    for secret in (SECRET, "a tenant's secret", "a-key", "a-label", "a-user", "a-stop-string"):
        assert json.dumps(secret).strip('"') not in text
    assert "testclient" not in text  # its address


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{TRACE_ID}-{PARENT_ID}", "00-0-0-01"])
def test_without_a_valid_traceparent_a_trace_begins(
    client: TestClient, exporter: InMemorySpanExporter, header: str
) -> None:
    complete(client, {"traceparent": header})
    assert whole(exporter.get_finished_spans()).parent is None


def test_what_the_client_does_not_sample_is_not_recorded(
    client: TestClient, exporter: InMemorySpanExporter
) -> None:
    assert complete(client, {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}) == 200
    assert exporter.get_finished_spans() == ()


def test_a_request_that_fails_has_its_code(
    client: TestClient, exporter: InMemorySpanExporter, dispatcher: ScriptedDispatcher
) -> None:
    failure = RequestFailed("gone", status=503, kind="server_error", code="worker_lost")
    dispatcher.script = [failure]
    assert complete(client) == 503
    request = whole(exporter.get_finished_spans())
    assert request.status.status_code is StatusCode.ERROR
    attributes = request.attributes or {}
    assert (attributes["pagewire.outcome"], attributes["error.type"]) == ("error", "worker_lost")
    assert attributes["gen_ai.response.finish_reasons"] == ()


def test_an_error_that_nobody_expected_is_not_described(
    client: TestClient, exporter: InMemorySpanExporter, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = [ZeroDivisionError(SECRET)]
    assert complete(client) == 500
    request = whole(exporter.get_finished_spans())
    assert (request.attributes or {})["error.type"] == "internal_error"
    assert SECRET not in request.to_json()
