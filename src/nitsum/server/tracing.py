"""Spans and OpenTelemetry metrics over OTLP, for requests and switches. Needs the `otel` extra.

chat  [----------------------------------------------]
queue [---]
prefill   [--------]
decode             [---------------------------------]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nitsum import __version__
from nitsum.errors import MissingDependency
from nitsum.messages import SwitchReport
from nitsum.server.caller import now_s

if TYPE_CHECKING:
    from nitsum.server.metrics import Watch

Attributes = dict[str, str | int | float | bool]

_HEADERS = ("traceparent", "tracestate")
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
"""By path; all else that reaches the engine is a chat."""


class _Call(NamedTuple):
    headers: dict[str, str]
    """Those of the caller's trace."""
    operation: str
    """Its name in OpenTelemetry's conventions."""


_call: ContextVar[_Call] = ContextVar("the call that is served")

_SEND_S = 2
"""Time that sending one batch may take, tries included."""

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class CallerTrace:
    """ASGI middleware: remembers the caller's trace, so that ours becomes a part of it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            found = {name: headers[name] for name in _HEADERS if name in headers}
            _call.set(_Call(found, _OPERATIONS.get(scope["path"], "chat")))
        await self._app(scope, receive, send)


class Tracing:
    """Sends what has ended; in batches and from threads of its own, so that nothing waits."""

    def __init__(self, url: str, model: str) -> None:
        """`url` is the collector's, such as `http://127.0.0.1:4318`.

        Raises `MissingDependency` without the `otel` extra.
        """
        try:
            self._open(url.rstrip("/"), model)
        except ImportError as error:
            raise MissingDependency(
                f"--otlp needs OpenTelemetry ({error.name} is missing): install nitsum[otel]."
            ) from error
        self._model = model
        self._to_unix_s = time.time() - now_s()

    def _open(self, url: str, model: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "nitsum", "service.version": __version__})
        self._spans = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._spans.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(f"{url}/v1/traces", timeout=_SEND_S))
        )
        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(f"{url}/v1/metrics", timeout=_SEND_S)
        )
        self._meters = MeterProvider([reader], resource, shutdown_on_exit=False)
        self._tracer = self._spans.get_tracer("nitsum", __version__)
        meter = self._meters.get_meter("nitsum", __version__)
        self._histograms = {
            name: meter.create_histogram(
                f"gen_ai.server.{name}", "s", explicit_bucket_boundaries_advisory=bounds
            )
            for name, bounds in (
                ("request.duration", _SECONDS),
                ("time_to_first_token", _SECONDS),
                ("time_per_output_token", _TOKEN_SECONDS),
            )
        }

    def ended(self, watch: Watch) -> None:
        """A request came to its end: one span, its phases as children, and the metrics."""
        from opentelemetry.trace import StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        call = _call.get(_Call({}, "chat"))
        parent = TraceContextTextMapPropagator().extract(call.headers)
        end_s = now_s()
        attributes = self._attributes(watch, call.operation)
        root = self._tracer.start_span(
            f"{call.operation} {self._model}",
            parent,
            attributes={**attributes, **_of_span(watch)},
            start_time=self._unix_ns(watch.request.arrival_s),
        )
        if watch.outcome not in ("ok", "aborted"):
            root.set_status(StatusCode.ERROR, watch.outcome)
        inside = set_span_in_context(root)
        for name, start_s, stop_s in phases(watch, end_s):
            child = self._tracer.start_span(name, inside, start_time=self._unix_ns(start_s))
            child.end(self._unix_ns(stop_s))
        root.end(self._unix_ns(end_s))
        self._observe(watch, end_s, attributes)

    def _observe(self, watch: Watch, end_s: float, attributes: Attributes) -> None:
        since_s = watch.request.arrival_s
        values = {
            "request.duration": end_s - since_s,
            "time_to_first_token": watch.ttft_s,
            "time_per_output_token": watch.tpot_s,
        }
        for name, value in values.items():
            if value is not None:
                self._histograms[name].record(value, attributes)

    def switched(self, report: SwitchReport) -> None:
        """A switch ended a moment ago."""
        end_s = now_s()
        span = self._tracer.start_span(
            "switch",
            attributes={
                "nitsum.plan.from": report.from_plan,
                "nitsum.plan.to": report.to_plan,
                "nitsum.switch.ok": report.ok,
                "nitsum.switch.num_requests": sum(wave.num_requests for wave in report.waves),
                "nitsum.switch.bytes_moved": sum(wave.bytes_moved for wave in report.waves),
            },
            start_time=self._unix_ns(end_s - report.duration_s),
        )
        span.end(self._unix_ns(end_s))

    def close(self) -> None:
        """Send what is left; waits for a collector that is away a few seconds at most."""
        self._spans.shutdown()
        self._meters.shutdown(1000 * _SEND_S)

    def _unix_ns(self, at_s: float) -> int:
        return int((at_s + self._to_unix_s) * 1e9)

    def _attributes(self, watch: Watch, operation: str) -> Attributes:
        return {
            "gen_ai.operation.name": operation,
            "gen_ai.system": "nitsum",
            "gen_ai.request.model": self._model,
            "openai.request.service_tier": watch.request.tier_asked,
            "openai.response.service_tier": watch.tier,
        }


def _of_span(watch: Watch) -> Attributes:
    """What is told of one request, and would be too many series for a metric."""
    request = watch.request
    found: dict[str, Any] = {
        "gen_ai.response.id": request.request_id,
        "gen_ai.usage.input_tokens": len(request.prompt),
        "gen_ai.usage.output_tokens": watch.num_tokens,
        "nitsum.outcome": watch.outcome,
        "nitsum.plan": watch.plan,
        "nitsum.lane": watch.lane,
        "nitsum.num_displaced": watch.num_displaced,
        "nitsum.chain_id": request.chain_id,
        "nitsum.tenant": request.tenant,
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def phases(watch: Watch, end_s: float) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) of what a request went through, as far as it came; monotonic seconds."""
    arrival_s = watch.request.arrival_s
    if watch.queue_s is None:
        yield "queue", arrival_s, end_s
        return
    begun_s = min(arrival_s + watch.queue_s, end_s)
    yield "queue", arrival_s, begun_s
    first_s = end_s if watch.first_s is None else watch.first_s
    yield "prefill", begun_s, max(begun_s, first_s)
    if watch.first_s is not None:
        yield "decode", watch.first_s, end_s
