"""The spans of requests, through OpenTelemetry.

The only module of the router that imports it, and nothing loads it unless traces are exported.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pagewire.router.spans import FinishedRequest, part_spans, request_attributes, request_span

_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True, kw_only=True)
class OtelTracing:
    """Writes the spans of finished requests to `tracer`."""

    tracer: Tracer
    model: str  # the name that clients use
    wall_clock_ns: Callable[[], int] = time.time_ns  # nanoseconds of Unix time

    def begin(self, operation: str, headers: Mapping[str, str]) -> "OtelRequestTrace":
        """See `Tracing`. A `traceparent` that is not valid begins a trace, as W3C asks."""
        return OtelRequestTrace(
            tracing=self, operation=operation, parent=_PROPAGATOR.extract(headers)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OtelRequestTrace:
    """See `RequestTrace`."""

    tracing: OtelTracing
    operation: str
    parent: Context

    def finish(self, request: FinishedRequest) -> None:
        tracer, model = self.tracing.tracer, self.tracing.model
        name = f"{self.operation} {model}"
        whole = request_span(request.split, name, self.tracing.wall_clock_ns())
        span = tracer.start_span(
            whole.name,
            context=self.parent,
            kind=SpanKind.SERVER,
            attributes=request_attributes(request, operation=self.operation, model=model),
            start_time=whole.start_ns,
        )
        if request.error_code is not None:
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for part in part_spans(request.split, whole.end_ns):
            child = tracer.start_span(part.name, context=inside, start_time=part.start_ns)
            child.end(part.end_ns)
        span.end(whole.end_ns)
