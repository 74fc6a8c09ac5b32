"""The `nitsum` command. Each command is a module of its own, imported only when it is asked for.

A command module has `add_arguments(parser)` and `run(args) -> int`, the exit status.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from nitsum.errors import ConfigError, NitsumError

COMMANDS = {
    "serve": "serve a model over an OpenAI-compatible API",
    "check-config": "say what is wrong with a configuration and how to fix it",
    "plans": "draw the plans a server would hold ready",
    "plan": "find the few layouts to hold ready for a workload",
    "profile": "measure step times of this machine into a cost table",
    "explain": "say in words why the layout changed, or did not",
    "simulate": "predict how plans and policies would serve a workload on a machine",
    "demo": "serve the demo model and switch plans under chats of three tiers",
    "top": "watch a server's lanes, ranks, tiers and queues in the terminal",
    "doctor": "say what this machine has, what is used of it, and what is missing",
    "fetch-demo": "download the demo model and convert it, once",
    "verify": "prove that switching the layout changes no result",
    "bench": "measure the engine or a server: engine, switch, serve, compare, soak",
    "keys": "make, list and revoke API keys",
    "report": "print who was served how well, what it cost, what the machine earned",
    "version": "print the version of Nitsum and of what it runs on",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the user's mistakes end in a sentence and status 2, others in status 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = _overview().parse_args(words[:1]).command
    module = import_module(f"nitsum.cli.{command.replace('-', '_')}")
    parser = argparse.ArgumentParser(f"nitsum {command}", description=_sentence(COMMANDS[command]))
    module.add_arguments(parser)
    try:
        return module.run(parser.parse_args(words[1:]))
    except NitsumError as error:
        print(f"nitsum {command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130


def _overview() -> argparse.ArgumentParser:
    lines = [f"  {name:14}{help_text}" for name, help_text in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        "nitsum",
        usage="nitsum COMMAND ...",
        description="LLM serving with a parallel layout that follows the load.",
        epilog="\n".join(["commands:", *lines, "", "`nitsum COMMAND --help` lists its flags."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=tuple(COMMANDS), help=argparse.SUPPRESS)
    return parser


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
