"""The fault tests at full size, with figures: `python -m tests.fault.prove trouble --json`.

    trouble   200 mixed calls while workers are killed 5 times and plans switch 10 times
    siege     10,000 malformed requests while good ones go on
    ledger    400 calls with refusals, downgrades, clients that leave, dead workers, a dead engine

Each starts its own server on a small random model and talks to nothing else. Status 1 when a
promise was broken; what it was is printed.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nitsum.bench.provenance import hardware, versions
from tests.fault import accounts
from tests.fault.calls import mixed_calls
from tests.fault.leaks import held, leaked
from tests.fault.model import PATIENT, make_model
from tests.fault.running import RunningServer
from tests.fault.siege import besiege
from tests.fault.trouble import Trouble, in_peace, in_trouble

Found = tuple[dict[str, float], list[str]]
"""Figures, and what went wrong, in words."""


def trouble(args: argparse.Namespace, model: Path, folder: Path) -> Found:
    calls = mixed_calls(args.calls or 200, args.seed)
    with _server(args, model, folder) as server:
        reference = in_peace(server, calls)
        before = held(server)
        outcome = in_trouble(server, reference, Trouble(args.kills, args.switches, args.seed))
        leaks = leaked(before, held(server))
        restarts = [float(s) for line in server.lines for s in re.findall(r"restart_s=(\S+)", line)]
    wrong = outcome.wrong()
    same = [
        got.choices[0].tokens == expected.choices[0].tokens
        for got, expected in zip(outcome.disturbed, reference, strict=True)
        if 0 in got.choices
    ]
    figures = {
        "num_calls": len(calls),
        "num_kills": outcome.num_kills,
        "num_switches": outcome.num_switches,
        "num_wrong": len(wrong),
        "num_identical": sum(same),
        "num_tokens": sum(answer.num_tokens for answer in outcome.disturbed),
        "run_s": outcome.seconds,
        "restart_median_s": statistics.median(restarts) if restarts else 0.0,
        "num_restarts": len(restarts),
        "num_leaks": len(leaks),
    }
    return figures, [*wrong.values(), *(f"leak: {name} {what}" for name, what in leaks.items())]


def siege(args: argparse.Namespace, model: Path, folder: Path) -> Found:
    calls = mixed_calls(12, args.seed, num_tokens=(5, 20))
    with _server(args, model, folder, "--client-timeout", "5") as server:
        besiege(server, calls, 200, args.seed + 1)
        before, workers = held(server), server.workers()
        found = besiege(server, calls, args.requests, args.seed)
        same_workers = server.workers() == workers
        leaks = leaked(before, held(server))
        traces = [line for line in server.lines if "Traceback" in line]
    growth = found.growth_mb()
    print("server, MB:", [round(one["server"]) for one in found.memory_mb], file=sys.stderr)
    by_status: Counter[str] = Counter()
    for (_, status), count in found.statuses.items():
        by_status[f"num_status_{status or 'none'}"] += count
    errors = sum(found.server_errors().values())
    figures = {
        "num_requests": args.requests,
        **by_status,
        "num_server_errors": errors,
        "num_stuck": len(found.stuck),
        "num_good_calls": found.num_good,
        "num_good_wrong": len(found.wrong),
        "good_round_before_s": found.calm_s,
        "good_round_meanwhile_s": found.besieged_s,
        **{f"growth_{name}_mb": mb for name, mb in growth.items()},
        **{f"steady_growth_{name}_mb": mb for name, mb in found.steady_growth_mb().items()},
        **{f"end_{name}_mb": mb for name, mb in found.memory_mb[-1].items()},
        "num_leaks": len(leaks),
        "siege_s": found.seconds,
    }
    problems = [*found.wrong, *traces, *(f"leak: {name} {what}" for name, what in leaks.items())]
    problems += [f"{key}: {n}" for key, n in found.server_errors().items()]
    problems += [f"memory grew: {growth}"] if found.grows() else []
    problems += ["a request got no answer"] * len(found.stuck)
    return figures, problems if same_workers else [*problems, "workers were started anew"]


def ledger(args: argparse.Namespace, model: Path, folder: Path) -> Found:
    tokens = accounts.make_keys(folder / "keys.json")
    own = ("--max-num-seqs", "4", "--keys", str(folder / "keys.json"), *accounts.flags(folder))
    calls = accounts.accounted_calls(args.calls or 400, tokens, args.seed)
    with RunningServer(model, folder, *_size(args), *own) as server:
        answers = accounts.run_accounted(server, calls, args.kills)
    records, report = accounts.read_ledger(folder)
    wrong = accounts.compare(answers, records)
    ours, theirs = accounts.ledger_totals(report), accounts.client_totals(answers, records)
    if ours != theirs:
        wrong.append(f"totals: the ledger has {ours}, clients {theirs}")
    statuses = Counter(record.status for record in records)
    figures = {
        "num_calls": len(calls),
        "num_records": len(records),
        **{f"num_{status}": count for status, count in statuses.items()},
        "num_downgraded": sum(r.tier_served != r.tier_asked for r in records),
        "num_credited": sum(record.credit_nano > 0 for record in records),
        "num_wrong": len(wrong),
        **{f"ledger_{name}": count for name, count in ours.items()},
        **{f"clients_{name}": count for name, count in theirs.items()},
    }
    return figures, wrong


def _server(args: argparse.Namespace, model: Path, folder: Path, *flags: str) -> RunningServer:
    tiers = folder / "tiers.yaml"
    tiers.write_text(PATIENT)
    return RunningServer(model, folder, *_size(args), "--tiers", str(tiers), *flags)


def _size(args: argparse.Namespace) -> tuple[str, ...]:
    return ("--ranks", str(args.ranks), "--kv-memory", args.kv_memory)


RUNS = {"trouble": trouble, "siege": siege, "ledger": ledger}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fault.prove",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kv-memory", default="8MiB", help="of a rank; little, so that it fills")
    parser.add_argument("--calls", type=int, help="of trouble (200) and ledger (400)")
    parser.add_argument("--kills", type=int, default=5, help="workers that are killed")
    parser.add_argument("--switches", type=int, default=10)
    parser.add_argument("--requests", type=int, default=10_000, help="malformed ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="a summary as benchmarks/results has")
    args = parser.parse_args(argv)
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="prove-") as name:
        folder = Path(name)
        figures, problems = RUNS[args.run](args, make_model(folder / "tiny"), folder)
    figures["seconds"] = time.monotonic() - started_s
    print(json.dumps(_summary(figures, argv)) if args.json else _lines(figures))
    for problem in problems:
        print(problem[:2000], file=sys.stderr)
    return 1 if problems else 0


def _summary(figures: dict[str, float], argv: list[str] | None) -> dict[str, Any]:
    words = sys.argv[1:] if argv is None else argv
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "tests.fault.prove", *words]),
        "versions": versions(),
        "hardware": hardware(),
        "notes": "llama of 3 layers and 512 tokens, random weights, float32",
        "figures": figures,
    }


def _lines(figures: dict[str, float]) -> str:
    return "\n".join(f"{name:28}{value:12.5g}" for name, value in figures.items())


if __name__ == "__main__":
    sys.exit(main())
