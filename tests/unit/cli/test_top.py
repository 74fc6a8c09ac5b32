"""The terminal's view of a server."""

from __future__ import annotations

import json
import socket
from collections import deque
from typing import Any

import httpx
import msgspec
import pytest
from rich.console import Console

from nitsum.cli import main, top
from nitsum.errors import NitsumError
from nitsum.server.state import LaneView, NewsView, RankView, State, TierView


def lane(first_rank: int, degree: int, **counts: int) -> LaneView:
    known = {"num_running": 0, "num_paused": 0, "num_waiting": 0, **counts}
    last = first_rank + degree - 1
    name = f"TP{degree}@{first_rank}" + (f"-{last}" if degree > 1 else "")
    return LaneView(
        name=name,
        first_rank=first_rank,
        degree=degree,
        role="mixed",
        tiers=(),
        draining=False,
        **known,
    )


def state(**changes: Any) -> dict[str, Any]:
    tier = TierView("priority", 2, 3, 10, 0.9, 250.0, 40.0, 300.0, 50.0, None)
    made = State(
        time_s=1000.0,
        uptime_s=7300.0,
        version="1.2.3",
        model="tiny",
        engine_up=True,
        plan="TP2/2xTP1",
        plans=["TP2/2xTP1", "TP2"],
        switching_to=None,
        generation=1,
        draining=False,
        lanes=[lane(0, 1, num_running=4), lane(1, 1, num_waiting=5), lane(0, 2, num_paused=6)],
        ranks=[RankView(0, 0.5, 0.25), RankView(1, 1.0, 0.0)],
        tiers=[tier],
        tokens_per_s=123.4,
        num_open=5,
        num_restarts=0,
        last_restart_s=0.0,
        decision="stayed because",
        news=[NewsView(65.0, "switch", "From A to B.", 2)],
    )
    return {**json.loads(msgspec.json.encode(made)), **changes}


def shown(one: dict[str, Any], width: int = 110) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(top.view(one, deque([1.0, 2.0])))
        return console.export_text()


def test_everything_is_there():
    text = shown(state())
    for words in (
        "Nitsum 1.2.3  tiny  ● serving  up 2 h  5 open  123 tokens/s",
        "TP1@0 4 running",
        "TP1@1 0 running, 5 waiting",
        "TP2@0-1 0 running, 6 paused",
        "now   stayed because",
        "90% of 10",
        "250 of 300",
        "1 min ago ● From A to B. (2 times)",
    ):
        assert words in text, text


def test_lanes_that_share_ranks_are_below_each_other():
    lines = shown(state()).splitlines()
    wide = next(i for i, line in enumerate(lines) if "TP2@0-1" in line)
    assert "TP1@0" in lines[wide + 1]
    assert "TP1@1" in lines[wide + 1]


def test_it_fits_a_narrow_terminal():
    assert max(map(len, shown(state(), width=60).splitlines())) <= 60


def test_every_number_is_there_in_a_terminal_of_80_columns():
    text = shown(state(), width=80)
    for words in ("rank 1", " 100% ", "priority", "waiting", "90% of 10", "250 of 300", "40 of 50"):
        assert words in text, text


def test_no_server_is_a_sentence(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        assert main(["top", f"http://127.0.0.1:{bound.getsockname()[1]}", "--once"]) == 1
    assert "No connection to http://127.0.0.1" in capsys.readouterr().err


def test_a_certificate_nobody_knows_has_a_way_out():
    error = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
    with httpx.Client(base_url="https://here") as http:
        assert "SSL_CERT_FILE" in top._no_connection(http, error)


def test_a_server_without_engine_says_so():
    text = shown(state(engine_up=False, lanes=[], ranks=[], plans=[], plan="", news=[]))
    assert "engine does not answer" in text
    assert "Nothing yet." in text


@pytest.mark.parametrize(("status", "words"), [(403, "needs the key"), (404, "is this a Nitsum")])
def test_refusals_are_sentences(status: int, words: str):
    body = {"error": {"message": "This needs the key."}}
    request = httpx.Request("GET", "http://localhost/admin/state")
    with pytest.raises(NitsumError, match=words):
        top._checked(httpx.Response(status, json=body, request=request))


def test_sparks():
    assert top.spark([0, 4, 8]) == "▁▅█"
    assert top.spark([]) == top.spark([0.0]) == ""
