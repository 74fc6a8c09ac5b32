"""Chunks filled into a form are the bytes that encoding them one by one gives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from nitsum.server.chat import ChatShape
from nitsum.server.chunks import ChunkWriter
from nitsum.server.completions import CompletionShape
from nitsum.server.token_counters import TokenCounters
from tests.server.server_kit import Bench, events_of

TEXTS = ["a", 'quo"te', "\\", "\n", "\0", "🦊", "data: {}", "\u2028", "</script>"]


@pytest.fixture(params=["chat", "completions"])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"return_token_ids": True},
        {"n": 2, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ],
)
@pytest.mark.parametrize("text", TEXTS)
def test_a_form_gives_the_same_bytes(
    bench: Bench, path: str, options: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same stream twice: with forms, and with a writer that never has one."""
    bench.says(f"the {text} quick {text}{text} fox")
    call = bench.chat if path == "chat" else bench.complete
    streams: list[list[dict[str, Any]]] = []
    for with_forms in (True, False):
        if not with_forms:
            monkeypatch.setattr(ChunkWriter, "_form", lambda *_: None)
        streams.append([_same(chunk) for chunk in events_of(call(stream=True, **options))])
    assert sorted(map(json.dumps, streams[0])) == sorted(map(json.dumps, streams[1]))
    assert [list(chunk) for chunk in streams[0]] == [list(chunk) for chunk in streams[1]]


def _same(chunk: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from call to call; fields stay in their order."""
    return {**chunk, "id": "", "created": 0}


def test_most_chunks_come_from_forms(
    bench: Bench, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test above compares nothing."""
    bench.says("the quick brown fox " * 5)
    shape = ChatShape if path == "chat" else CompletionShape
    slow: list[object] = []
    chunks = shape.chunks
    monkeypatch.setattr(shape, "chunks", lambda *args: slow.append(args) or list(chunks(*args)))
    call = bench.chat if path == "chat" else bench.complete
    num_chunks = len(events_of(call(stream=True)))
    assert len(slow) <= 3
    assert num_chunks > 10


def test_gaps_between_tokens_are_sorted_into_buckets() -> None:
    registry = CollectorRegistry()
    counters = TokenCounters(registry, "m", (0.1, 0.2))
    for gap_s in (0.05, 0.1, 0.15, 9.0):
        counters.saw_gap(gap_s)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "m", **labels})

    name = "vllm:inter_token_latency_seconds"
    assert [value(f"{name}_bucket", le=le) for le in ("0.1", "0.2", "+Inf")] == [2, 3, 4]
    assert value(f"{name}_sum") == pytest.approx(9.3)
    assert value(f"{name}_count") == 4
