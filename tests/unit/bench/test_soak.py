"""The soak's clients and their judgement, against a server that is told what to do wrong."""

from __future__ import annotations

import asyncio
import json
import os
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path

import httpx
import pytest

from nitsum.bench.process_memory import resident_bytes
from nitsum.bench.soak import TIERS, Options, Result, make_body, soak
from nitsum.cli import bench_soak
from nitsum.shape import ModelShape
from tests.checkpoints import SIZES


class Server:
    """Answers as the real one does; every tenth completion is `wrong`."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.num_completions = 0
        self.switched_to: list[str] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.001)
        match request.url.path:
            case "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "m"}]})
            case "/admin/plans":
                return httpx.Response(200, json={"plan": "A", "plans": ["A", "B"]})
            case "/admin/state":
                return httpx.Response(200, json={"ranks": [{"kv_used": 0.5}, {"kv_used": 1.0}]})
            case "/admin/plans/switch":
                self.switched_to.append(json.loads(request.content)["plan"])
                return httpx.Response(200, json={})
            case _:
                return self._complete(json.loads(request.content))

    def _complete(self, body: dict) -> httpx.Response:
        self.num_completions += 1
        tokens = [1] * body["max_tokens"]
        if self.num_completions % 10 == 0:
            if self.wrong == "refused":
                return httpx.Response(503)
            if self.wrong == "stuck":
                raise httpx.ReadTimeout("nothing came")
            if self.wrong == "short":
                tokens.pop()
            if self.wrong == "error":
                return httpx.Response(200, text='data: {"error": {"code": "gone"}}\n')
        text = "a line\x85\u2028that goes on"
        choice = {"token_ids": tokens, "finish_reason": "length", "text": text}
        chunk = json.dumps({"choices": [choice]}, ensure_ascii=False)
        return httpx.Response(200, text=f"data: {chunk}\n\ndata: [DONE]\n\n")


def test_the_shape_that_comes_with_the_examples_is_the_published_soak_s():
    """It was run on a checkpoint that only the tests write."""
    folder = Path(__file__).parents[3] / "examples" / "tiny"
    written = json.loads((folder / "config.json").read_text())
    assert {key: written[key] for key in SIZES if SIZES[key] is not None} == {
        key: size for key, size in SIZES.items() if size is not None
    }
    assert ModelShape.from_folder(folder).num_layers == 3


def run(server: Server) -> Result:
    client = httpx.AsyncClient(base_url="http://test", transport=httpx.MockTransport(server))
    options = Options(duration_s=0.5, num_clients=3, rest_s=0.01)
    return asyncio.run(soak(client, options, lambda *_: None, lambda: 100.0))


def test_a_server_that_does_nothing_wrong():
    server = Server()
    figures = run(server).figures()
    assert figures["soak_failed"] == 0
    assert figures["soak_requests"] == server.num_completions > 10
    assert figures["soak_switches"] == len(server.switched_to) > 1
    assert server.switched_to[:3] == ["B", "A", "B"]
    assert figures["kv_used_mean_share"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ("refused", "status 503"),
        ("stuck", "stuck"),
        ("short", "wrong token count"),
        ("error", "error gone"),
    ],
)
def test_what_goes_wrong_is_counted(wrong: str, kind: str):
    server = Server(wrong)
    result = run(server)
    assert result.failed == {kind: server.num_completions // 10}
    assert result.figures()["soak_failed"] > 0


def test_growth_is_the_last_third_over_the_second():
    result = Result(memory_bytes=[50.0, 60.0, 100.0, 100.0, 110.0, 110.0])
    assert result.memory_growth_share == pytest.approx(0.1)


def test_requests_are_the_same_in_each_run_and_differ_from_each_other():
    options = Options()
    bodies = [make_body(options, number, "m") for number in range(50)]
    assert bodies == [make_body(options, number, "m") for number in range(50)]
    assert len({tuple(body["prompt"]) for body in bodies}) > 40
    assert all(1 <= len(body["prompt"]) <= options.longest_prompt for body in bodies)
    assert {body["service_tier"] for body in bodies} == set(TIERS)


def test_memory_of_this_process():
    assert resident_bytes(os.getpid()) > 10e6


def test_prompts_are_as_long_as_asked_for_and_often_begin_alike():
    options = Options(longest_prompt=600, longest_answer=7)
    bodies = [make_body(options, number, "m") for number in range(400)]
    lengths = [len(body["prompt"]) for body in bodies]
    assert 500 < max(lengths) <= 600
    assert max(body["max_tokens"] for body in bodies) == 7
    heads = Counter(tuple(body["prompt"][:200]) for body in bodies if len(body["prompt"]) >= 200)
    assert sum(count for head, count in heads.items() if count > 20) > 150


def test_the_server_is_started_as_asked():
    parser = ArgumentParser()
    bench_soak.add_arguments(parser)
    words = "m --device cuda --load-format dummy --plans TP2,2xTP1 --kv-memory 4GiB --ranks 2"
    plain = bench_soak.serve_flags(parser.parse_args(["m"]))
    flags = bench_soak.serve_flags(parser.parse_args(words.split()))
    assert flags[0] == plain[0] == "m"
    assert {*words.split()} <= {*flags}
    assert "--plans" not in plain
