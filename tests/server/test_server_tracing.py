"""Spans and metrics as a collector gets them; the collector is a stub, the protocol is real."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="install nitsum[otel]")

import httpx
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from nitsum.engine.fake_client import FakeEngineClient
from tests.server.server_kit import MODEL, Bench, served

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Keeps the spans and metrics it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[Any] = []
        self.metrics: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            data = gzip.decompress(data)
        if self.path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                for scope in resource.scope_spans:
                    self.server.spans.extend(scope.spans)
        elif self.path == "/v1/metrics":
            for resource in ExportMetricsServiceRequest.FromString(data).resource_metrics:
                for scope in resource.scope_metrics:
                    self.server.metrics.extend(scope.metrics)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(of: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in of.attributes:
        kind = pair.value.WhichOneof("value")
        found[pair.key] = getattr(pair.value, kind)
    return found


def test_requests_and_switches_become_spans(checkpoint: Path, collector: Collector):
    engine = FakeEngineClient(plans=("TP1", "TP2"), delay_s=0.005)
    bench = Bench(checkpoint, engine, otlp=collector.url).says("Hello world")

    async def main() -> None:
        async with served(bench) as url, httpx.AsyncClient(base_url=url) as http:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
            asked = {**body, "service_tier": "fast"}
            answer = await http.post("/v1/chat/completions", json=asked, headers=headers)
            assert answer.status_code == 200
            await http.post("/admin/plans/switch", json={"plan": "TP2"})

    asyncio.run(main())
    spans = {span.name: span for span in collector.spans}
    assert set(spans) == {f"chat {MODEL}", "queue", "prefill", "decode", "switch"}
    root = spans[f"chat {MODEL}"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    _phases_follow_each_other(spans, root)
    told = attributes(root)
    assert told["openai.request.service_tier"] == "priority"
    assert told["openai.response.service_tier"] == "priority"
    assert told["gen_ai.usage.output_tokens"] == len(bench.ids("Hello world")) + 1
    assert told["nitsum.outcome"] == "ok"
    assert attributes(spans["switch"])["nitsum.plan.to"] == "TP2"
    _metrics_came(collector)


@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        ("/v1/completions", {"prompt": "hi"}, "text_completion"),
        ("/v1/embeddings", {"input": "hi"}, "embeddings"),
    ],
)
def test_what_was_asked_for_is_told(
    checkpoint: Path, collector: Collector, path: str, body: dict[str, str], operation: str
):
    bench = Bench(checkpoint, otlp=collector.url).says("Hello")

    async def main() -> None:
        async with served(bench) as url, httpx.AsyncClient(base_url=url) as http:
            assert (await http.post(path, json=body)).status_code == 200

    asyncio.run(main())
    (root,) = [span for span in collector.spans if not span.parent_span_id]
    assert root.name == f"{operation} {MODEL}"
    assert attributes(root)["gen_ai.operation.name"] == operation


def _phases_follow_each_other(spans: dict[str, Any], root: Any) -> None:
    queue, prefill, decode = (spans[name] for name in ("queue", "prefill", "decode"))
    assert all(one.parent_span_id == root.span_id for one in (queue, prefill, decode))
    assert queue.start_time_unix_nano == root.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano == root.end_time_unix_nano
    assert decode.end_time_unix_nano > decode.start_time_unix_nano


def _metrics_came(collector: Collector) -> None:
    metrics = {metric.name: metric for metric in collector.metrics}
    assert set(metrics) == {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }
    (point,) = metrics["gen_ai.server.request.duration"].histogram.data_points
    assert point.count == 1
    assert attributes(point)["openai.response.service_tier"] == "priority"


def test_a_collector_that_is_away_disturbs_nobody(checkpoint: Path):
    bench = Bench(checkpoint, otlp="http://127.0.0.1:9").says("Hello")

    async def main() -> None:
        async with served(bench) as url, httpx.AsyncClient(base_url=url) as http:
            body = {"model": MODEL, "prompt": "hi"}
            assert (await http.post("/v1/completions", json=body)).status_code == 200

    asyncio.run(main())
