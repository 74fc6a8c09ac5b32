"""`nitsum serve`: engine and workers first, then the server in this process."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from nitsum.cli.build import build_engine_config, build_server_settings, check_books, check_tls
from nitsum.cli.checkpoint import checkpoint_folder
from nitsum.cli.drawing import draw_plan
from nitsum.cli.keeper import EngineKeeper
from nitsum.cli.memory_table import memory_table
from nitsum.cli.ports import port_problem
from nitsum.cli.progress import note
from nitsum.cli.settings import ServeSettings
from nitsum.cli.sources import add_flags, settings_or_error
from nitsum.config import EngineConfig
from nitsum.engine.client import ZmqEngineClient
from nitsum.errors import ConfigError, require_torch
from nitsum.messages import EngineReady
from nitsum.server import logs
from nitsum.server.access import is_loopback
from nitsum.server.run import serve
from nitsum.server.settings import ServerSettings
from nitsum.shape import ModelShape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ServeSettings)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; status 1 if the engine was lost for good."""
    require_torch()
    settings = settings_or_error(ServeSettings, args, os.environ)
    if problem := port_problem(settings.host, settings.port):
        raise ConfigError(problem)  # said now, not after the model is loaded
    check_books(settings)
    check_tls(settings)
    logs.set_up(settings.log_level, settings.log_format)
    model = checkpoint_folder(settings.model)
    config = build_engine_config(settings, model)
    signal.signal(signal.SIGTERM, _exit)  # until the server has its own handler
    with tempfile.TemporaryDirectory(prefix="nitsum-") as folder:
        return _serve(settings, config, model, f"ipc://{folder}/engine")


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _serve(settings: ServeSettings, config: EngineConfig, model: Path, address: str) -> int:
    lost: list[bool] = []

    def give_up() -> None:
        lost.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    keeper = EngineKeeper(config, ModelShape.from_folder(model), address, give_up)
    try:
        ready = keeper.start()
        server = build_server_settings(settings, model, ready.max_request_tokens)
        serve(
            server,
            ZmqEngineClient(address),
            on_ready=lambda url: _announce(_reachable(url), server, config, ready),
        )
    finally:
        keeper.stop()
    return int(bool(lost))


def _reachable(url: str) -> str:
    """An address to paste: 0.0.0.0 listens everywhere but is nowhere."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _announce(url: str, server: ServerSettings, config: EngineConfig, ready: EngineReady) -> None:
    """What runs, where, and how to talk to it."""
    plans = config.plans
    others = [plan.name for plan in plans.plans if plan.name != plans.initial]
    note(f"\nPlan {draw_plan(plans[plans.initial], plans.num_ranks)}")
    if others:
        note(f"Also resident: {', '.join(others)}")
    note(f"Longest request: {ready.max_request_tokens:,} tokens.")
    note(memory_table([worker.memory_bytes for worker in ready.workers]))
    print(f"\nServing {server.model_names[0]} at {url}\n\n{curl_line(url, server)}\n")
    if warning := open_to_all(server):
        note(warning)
    if others:
        print(f"Change the layout while it answers:\n\n{switch_line(url, others[0], server)}\n")
    sys.stdout.flush()


def open_to_all(server: ServerSettings) -> str:
    """A warning, where callers from elsewhere need no key; else nothing."""
    if is_loopback(server.host) or server.api_key or server.keys:
        return ""
    return (
        f"Whoever can reach {server.host} may use this server: no key is asked for. Give --api-key "
        "or --keys to change that."
    )


def curl_line(url: str, server: ServerSettings) -> str:
    """A request that streams an answer, to be pasted into a shell."""
    body = {
        "model": server.model_names[0],
        "messages": [{"role": "user", "content": "Name three rivers of Europe."}],
        "max_tokens": 60,
        "stream": True,
    }
    return _curl(
        f"{url}/v1/chat/completions",
        body,
        "$NITSUM_API_KEY" if server.api_key or server.keys else "",
    )


def switch_line(url: str, plan: str, server: ServerSettings) -> str:
    """A request that switches the plan."""
    key = "$NITSUM_ADMIN_KEY" if server.admin_key else ""
    return _curl(f"{url}/admin/plans/switch", {"plan": plan}, key)


def _curl(url: str, body: dict[str, object], key: str) -> str:
    authorization = f' -H "Authorization: Bearer {key}"' if key else ""
    data = shlex.quote(json.dumps(body))
    return f"curl -sN {url} -H 'Content-Type: application/json'{authorization} -d {data}"
