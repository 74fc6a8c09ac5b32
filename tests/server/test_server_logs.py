"""Lines of the log, and what they say of a request."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from nitsum.messages import Output
from nitsum.server.logs import JsonFormatter, TextFormatter
from tests.server.server_kit import Bench


def lines(caplog: pytest.LogCaptureFixture, formatter: logging.Formatter) -> list[str]:
    return [
        formatter.format(record) for record in caplog.records if record.name == "nitsum.request"
    ]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "nitsum")
    return caplog


def test_a_request_ends_in_one_line(bench: Bench, log: pytest.LogCaptureFixture):
    bench.says("Hello world").chat(service_tier="flex", stream=True)
    (line,) = lines(log, JsonFormatter())
    found = json.loads(line)
    assert found["message"] == "POST /v1/chat/completions 200"
    assert found["request_id"].startswith("req_")
    assert (found["tier"], found["outcome"], found["status"]) == ("flex", "ok", 200)
    assert found["num_output"] == len(bench.ids("Hello world")) + 1
    assert found["ttft_ms"] >= 0


def test_several_answers_add_up(bench: Bench, log: pytest.LogCaptureFixture):
    bench.says("Hello").chat(n=3)
    (line,) = lines(log, JsonFormatter())
    assert json.loads(line)["num_output"] == 3 * (len(bench.ids("Hello")) + 1)


def test_text_lines_read_well(bench: Bench, log: pytest.LogCaptureFixture):
    bench.post("/v1/chat/completions", {"messages": []}, headers={"x-request-id": "mine"})
    (line,) = lines(log, TextFormatter())
    assert " INFO nitsum.request POST /v1/chat/completions 400 request_id=mine status=400" in line


def test_a_path_cannot_forge_a_line(bench: Bench, log: pytest.LogCaptureFixture):
    bench.get("/nothing%0a2026-01-01T00:00:00.000Z%20INFO%20forged")
    (line,) = lines(log, TextFormatter())
    assert "\n" not in line


def test_a_refusal_says_why(checkpoint: Path, log: pytest.LogCaptureFixture):
    bench = Bench(checkpoint)
    bench.engine._refuse = lambda request: Output(
        request.request_id, error="full", error_status=429, error_code="rate_limit_exceeded"
    )
    bench.chat()
    (line,) = lines(log, JsonFormatter())
    assert json.loads(line)["outcome"] == "rate_limit_exceeded"


def test_probes_are_quiet(bench: Bench, log: pytest.LogCaptureFixture):
    for path in ("/health", "/metrics", "/load", "/admin/state", "/"):
        assert bench.get(path).status_code == 200
    assert lines(log, TextFormatter()) == []


def test_an_exception_stays_in_its_line():
    try:
        raise ValueError("why")
    except ValueError as error:
        record = logging.LogRecord("nitsum", 40, "", 0, "oh", None, (type(error), error, None))
    assert json.loads(JsonFormatter().format(record))["exception"] == "ValueError: why"
