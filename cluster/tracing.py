"""Whether an instance exports traces, and the exporter: OTLP over HTTP, from the OpenTelemetry SDK.

`--otlp-endpoint` or the standard variables of OpenTelemetry (``OTEL_EXPORTER_OTLP_ENDPOINT=…``) ask
for it; the SDK itself reads those for headers, sampling and resource attributes. The SDK is not
loaded otherwise.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from pagewire.cluster.errors import StartError
from pagewire.router.spans import Tracing

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HTTP = "http/protobuf"


def exports_traces(endpoint: str | None, environment: Mapping[str, str]) -> bool:
    """Whether traces go anywhere; the variables that switch them off win."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    return endpoint is not None or any(environment.get(name) for name in _ENDPOINTS)


def require_http(endpoint: str | None, environment: Mapping[str, str]) -> None:
    """Raise StartError when the environment asks for OTLP over anything but HTTP."""
    for name in _PROTOCOLS if endpoint is None else ():
        protocol = environment.get(name, _HTTP)
        if protocol != _HTTP:
            raise StartError(f"{name} is {protocol}; traces are exported over {_HTTP} only")


@asynccontextmanager
async def export_traces(
    endpoint: str | None, served_model: str, environment: Mapping[str, str]
) -> AsyncIterator[Tracing | None]:
    """Traces to `endpoint`, a collector's URL, until the block ends; then the last ones leave.

    Without an endpoint to where the environment says; None, and nothing is loaded, when it does
    not say either. Raises StartError when the exporter is not installed.
    """
    if not exports_traces(endpoint, environment):
        yield None
        return
    require_http(endpoint, environment)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartError(
            "traces need OpenTelemetry's exporter; install pagewire[otel], or leave out "
            "otlp_endpoint and OTEL_EXPORTER_OTLP_ENDPOINT"
        ) from error
    from pagewire.router.otel_tracing import OtelTracing

    url = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
    resource = Resource({"service.name": "pagewire"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    try:
        yield OtelTracing(tracer=provider.get_tracer("pagewire.router"), model=served_model)
    finally:
        await asyncio.to_thread(provider.shutdown)
