"""`nitsum top`: what the dashboard shows, in a terminal."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nitsum.errors import NitsumError

RETRY_S = 2.0
HISTORY = 600
WIDE = 110
"""Columns for ranks and tiers side by side."""
SPARKS = "▁▂▃▄▅▆▇█"
COLOURS = {1: "green", 2: "blue", 4: "magenta"}
KINDS = {"switch": "blue", "decision": "magenta", "restart": "red", "trouble": "yellow"}

State = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="the server's URL")
    parser.add_argument(
        "--admin-key",
        default=os.environ.get("NITSUM_ADMIN_KEY", ""),
        metavar="KEY",
        help="needed from another machine (default: $NITSUM_ADMIN_KEY)",
    )
    parser.add_argument("--once", action="store_true", help="print the state once and end")


def run(args: argparse.Namespace) -> int:
    """Show the state until interrupted."""
    headers = {"authorization": f"Bearer {args.admin_key}"} if args.admin_key else {}
    with httpx.Client(base_url=args.url, headers=headers, timeout=30) as http:
        if args.once:
            Console().print(view(_state(http), deque()))
            return 0
        _live(http)
    return 0


def _live(http: httpx.Client) -> None:
    rates: deque[float] = deque(maxlen=HISTORY)
    with Live(Text(f"Connecting to {http.base_url} ..."), screen=True, auto_refresh=False) as live:
        while True:
            try:
                for state in _states(http):
                    rates.extend(one["tokens_per_s"] for one in state["history"])
                    rates.append(state["tokens_per_s"])
                    live.update(view(state, rates), refresh=True)
            except httpx.HTTPError as error:
                live.update(Text(f"{_no_connection(http, error)} Trying again."), refresh=True)
            time.sleep(RETRY_S)


def _state(http: httpx.Client) -> State:
    try:
        return _checked(http.get("/admin/state"))
    except httpx.HTTPError as error:
        raise NitsumError(_no_connection(http, error)) from None


def _no_connection(http: httpx.Client, error: httpx.HTTPError) -> str:
    text = f"No connection to {http.base_url}: {error}."
    if "CERTIFICATE_VERIFY_FAILED" in text:
        text += " Name the certificate of its issuer in SSL_CERT_FILE."
    return text


def _states(http: httpx.Client) -> Iterator[State]:
    with http.stream("GET", "/admin/state/stream") as answer:
        if answer.is_error:
            answer.read()
        _checked(answer)
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])


def _checked(answer: httpx.Response) -> State:
    """The body, if there is one yet; raises `NitsumError` for a server that refuses."""
    if answer.status_code in (401, 403):
        raise NitsumError(answer.json()["error"]["message"])
    if answer.is_error:
        raise NitsumError(f"{answer.url} answered {answer.status_code}; is this a Nitsum server?")
    return answer.json() if answer.is_stream_consumed else {}


# --- drawing -------------------------------------------------------------------------------------


def view(state: State, rates: deque[float]) -> RenderableType:
    """The whole screen."""
    middle = Beside(_ranks(state), _tiers(state))
    return Group(_head(state, rates), _lanes(state), middle, _news(state))


class Beside:
    """Two panels beside each other, or below where the terminal is too narrow to read them."""

    def __init__(self, left: RenderableType, right: RenderableType) -> None:
        self._left, self._right = left, right

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < WIDE:
            yield from (self._left, self._right)
            return
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(ratio=2)
        grid.add_column(ratio=3)
        grid.add_row(self._left, self._right)
        yield grid


def _head(state: State, rates: deque[float]) -> RenderableType:
    health, colour = _health(state)
    text = Text.assemble(
        (f"Nitsum {state['version']}", "bold"),
        f"  {state['model']}  ",
        (f"● {health}", colour),
        f"  up {duration(state['uptime_s'])}  {state['num_open']} open  ",
        (f"{state['tokens_per_s']:.0f} tokens/s ", "bold"),
        (spark(list(rates)[-40:]), "blue"),
    )
    return Panel(text, border_style="dim")


def _health(state: State) -> tuple[str, str]:
    if not state["engine_up"]:
        return "engine does not answer", "red"
    if state["draining"]:
        return "draining", "yellow"
    if state["switching_to"]:
        return f"switching to {state['switching_to']}", "yellow"
    return "serving", "green"


def _lanes(state: State) -> RenderableType:
    """Ranks across; lanes as bars over their ranks, those that overlap below each other."""
    table = Table.grid(expand=True, padding=(0, 1))
    lanes = sorted(state["lanes"], key=lambda lane: (-lane["degree"], lane["first_rank"]))
    layers: list[list[State]] = []
    for lane in lanes:
        free = next((row for row in layers if not any(_overlap(lane, o) for o in row)), None)
        if free is None:
            layers.append([lane])
        else:
            free.append(lane)
    table.add_column()
    for layer in layers:
        table.add_row(_layer(layer, len(state["ranks"])))
    others = "  ".join(plan for plan in state["plans"] if plan != state["plan"])
    title = Text.assemble(" plan ", (state["plan"] or "-", "bold"), (f"   {others} ", "dim"))
    return Panel(table, title=title, title_align="left", border_style="dim")


def _overlap(one: State, other: State) -> bool:
    end, other_end = (lane["first_rank"] + lane["degree"] for lane in (one, other))
    return one["first_rank"] < other_end and other["first_rank"] < end


def _layer(layer: list[State], num_ranks: int) -> RenderableType:
    row = Table.grid(expand=True, padding=(0, 1, 0, 0))
    cells: list[RenderableType] = []
    rank = 0
    for lane in [*sorted(layer, key=lambda lane: lane["first_rank"]), None]:
        start = num_ranks if lane is None else lane["first_rank"]
        if start > rank:
            row.add_column(ratio=start - rank)
            cells.append("")
        if lane is not None:
            row.add_column(ratio=lane["degree"])
            cells.append(_lane(lane))
            rank = start + lane["degree"]
    row.add_row(*cells)
    return row


def _lane(lane: State) -> RenderableType:
    counts = f"{lane['num_running']} running"
    for name in ("waiting", "paused"):
        counts += f", {lane[f'num_{name}']} {name}" if lane[f"num_{name}"] else ""
    text = Text.assemble((f" {lane['name']} ", "bold"), counts)
    colour = COLOURS.get(lane["degree"], "magenta")
    text.stylize(f"black on {colour}")
    text.pad_right(200)
    text.stylize(f"on {colour}")
    text.no_wrap, text.overflow = True, "crop"
    return text


def _ranks(state: State) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for rank in state["ranks"]:
        busy, kv_used = rank["busy"], rank["kv_used"]
        row = (f"rank {rank['rank']}", bar(busy, "blue"), f"{busy:.0%}")
        table.add_row(*row, bar(kv_used, "green"), f"{kv_used:.0%}")
    return Panel(table, title=" ranks: steps, KV ", title_align="left", border_style="dim")


def _tiers(state: State) -> RenderableType:
    table = Table(box=None, expand=True, header_style="dim", pad_edge=False)
    for name in ("tier", "waiting", "running", "met", "TTFT ms", "TPOT ms"):
        table.add_column(name, justify="left" if name == "tier" else "right", no_wrap=True)
    for tier in state["tiers"]:
        waiting = Text(str(tier["num_waiting"]), "yellow" if tier["num_waiting"] else "dim")
        times = (_time(tier, name) for name in ("ttft", "tpot"))
        table.add_row(tier["name"], waiting, str(tier["num_running"]), _share(tier), *times)
    return Panel(table, title=" tiers, last 5 minutes ", title_align="left", border_style="dim")


def _share(tier: State) -> Text:
    share = tier["attained"]
    if share is None:
        return Text("-", "dim")
    colour = "green" if share >= 0.95 else "yellow" if share >= 0.8 else "red"
    return Text(f"{share:.0%} of {tier['num_ended']}", colour)


def _time(tier: State, name: str) -> str:
    value, target = tier[f"{name}_ms"], tier[f"{name}_target_ms"]
    shown = "-" if value is None else f"{value:.0f}"
    return shown if target is None else f"{shown} of {target:.0f}"


def _news(state: State) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    if state["decision"]:
        table.add_row(Text("now", "dim", justify="right"), "", Text(state["decision"]))
    for one in state["news"][:12]:
        again = f" ({one['count']} times)" if one["count"] > 1 else ""
        ago = Text(f"{duration(one['ago_s'])} ago", "dim", justify="right")
        table.add_row(ago, Text("●", KINDS.get(one["kind"], "blue")), Text(one["text"] + again))
    if not state["news"]:
        table.add_row(Text("Nothing yet.", "dim"))
    return Panel(table, title=" what happened ", title_align="left", border_style="dim")


def bar(share: float, colour: str, width: int = 10) -> Text:
    """`share` of `width` columns filled."""
    filled = round(share * width)
    return Text.assemble(("━" * filled, colour), ("━" * (width - filled), "bright_black"))


def spark(values: list[float]) -> str:
    """The values as little columns, the largest at full height."""
    peak = max(values, default=0.0)
    if not peak:
        return ""
    return "".join(SPARKS[round(value / peak * (len(SPARKS) - 1))] for value in values)


def duration(seconds: float) -> str:
    """In the largest unit that fits."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
