"""`nitsum bench`: one word for each measurement, each in a module of its own."""

from __future__ import annotations

import argparse

from nitsum.cli import (
    bench_compare,
    bench_control,
    bench_engine,
    bench_first,
    bench_load,
    bench_overlay,
    bench_soak,
    bench_switch,
)

_MEASUREMENTS = (
    (
        "engine",
        "decode speed against transformers and against the floor of memory",
        bench_engine.add_arguments,
        bench_engine.run,
    ),
    (
        "switch",
        "what a plan switch costs the streams that run across it",
        bench_switch.add_arguments,
        bench_switch.run,
    ),
    (
        "first",
        "what the first request of a class takes, over the median of later ones",
        bench_first.add_arguments,
        bench_first.run,
    ),
    (
        "overlay",
        "what it costs lanes to take turns on the same GPUs",
        bench_overlay.add_arguments,
        bench_overlay.run,
    ),
    (
        "control",
        "in simulation, whether changing plans pays against every static layout",
        bench_control.add_arguments,
        bench_control.run,
    ),
    (
        "serve",
        "latency and goodput of a running server under a workload",
        bench_load.add_arguments,
        bench_load.run,
    ),
    (
        "compare",
        "several servers under the same arrivals, turn by turn",
        bench_compare.add_arguments,
        bench_compare.run,
    ),
    (
        "soak",
        "whether anything fails, sticks or grows while the layout never rests",
        bench_soak.add_arguments,
        bench_soak.run,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each measurement."""
    words = parser.add_subparsers(metavar="WHAT", required=True)
    for word, help_text, add, measure in _MEASUREMENTS:
        subparser = words.add_parser(word, help=help_text)
        add(subparser)
        subparser.set_defaults(measure=measure)


def run(args: argparse.Namespace) -> int:
    return args.measure(args)
