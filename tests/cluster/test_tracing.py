"""Whether traces are exported, where to, and what is said when they cannot be."""

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from types import ModuleType

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pagewire.cluster.config import load_config
from pagewire.cluster.errors import ConfigError, StartError
from pagewire.cluster.tracing import export_traces, exports_traces, require_http
from pagewire.router.spans import FinishedRequest
from pagewire.router.time_ledger import Part, TimeSplit

EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
COLLECTOR = "http://collector:4318"
FINISHED = FinishedRequest(
    request_id="id",
    outcome="stop",
    error_code=None,
    finish_reasons=("stop",),
    num_prompt_tokens=1,
    num_cached_tokens=0,
    num_output_tokens=1,
    split=TimeSplit(total_s=1.0, parts=dict.fromkeys(Part, 0.1)),
)


@pytest.mark.parametrize(
    ("endpoint", "environment", "expected"),
    [
        (None, {}, False),
        (COLLECTOR, {}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR}, True),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": COLLECTOR}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        (None, {"OTEL_SERVICE_NAME": "serving"}, False),
        (COLLECTOR, {"OTEL_SDK_DISABLED": "true"}, False),
        (COLLECTOR, {"OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_who_asks_for_traces(
    endpoint: str | None, environment: Mapping[str, str], expected: bool
) -> None:
    assert exports_traces(endpoint, environment) is expected


def test_another_protocol_is_refused() -> None:
    with pytest.raises(StartError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL is grpc; .* http/protobuf"):
        require_http(None, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    require_http(COLLECTOR, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


@pytest.mark.parametrize("url", ["collector:4318", "grpc://collector:4317", "http://"])
def test_an_endpoint_is_a_url(url: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        load_config({"otlp_endpoint": url})
    assert load_config({"otlp_endpoint": COLLECTOR}).config.otlp_endpoint == COLLECTOR


def test_a_missing_exporter_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)

    async def run() -> None:
        async with export_traces(COLLECTOR, "model", {}):
            raise AssertionError("it started")

    with pytest.raises(StartError, match=r"install pagewire\[otel\]"):
        asyncio.run(run())


def test_what_has_not_left_leaves_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    endpoints: list[str | None] = []

    def make(endpoint: str | None) -> InMemorySpanExporter:
        endpoints.append(endpoint)
        return exporter

    module = ModuleType(EXPORTER)
    module.OTLPSpanExporter = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, EXPORTER, module)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")

    async def run() -> None:
        async with export_traces(f"{COLLECTOR}/", "model", {}) as tracing:
            assert tracing is not None
            tracing.begin("chat", {}).finish(FINISHED)

    asyncio.run(run())
    assert endpoints == [f"{COLLECTOR}/v1/traces"]
    *_, request = exporter.get_finished_spans()
    assert request.name == "chat model"
    resource = request.resource.attributes
    assert resource["service.name"] == "pagewire"
    assert resource["deployment.environment.name"] == "test"


def test_nothing_is_loaded_for_those_who_do_not_ask() -> None:
    program = """
import asyncio, sys
from pagewire.cluster.tracing import export_traces
from pagewire.router import app
async def run():
    async with export_traces(None, "model", {}) as tracing:
        assert tracing is None
asyncio.run(run())
loaded = ("opentelemetry.sdk", "opentelemetry.exporter", "pagewire.router.otel_tracing")
print([name for name in sys.modules if name.startswith(loaded)])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
