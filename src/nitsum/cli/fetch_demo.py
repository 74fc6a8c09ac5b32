"""`nitsum fetch-demo`: get the demo model ready and print where it is."""

from __future__ import annotations

import argparse

from nitsum.cli.checkpoint import fetch_demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags; `NITSUM_CACHE` says where checkpoints are kept."""


def run(args: argparse.Namespace) -> int:
    """The folder's path goes to standard output, progress to standard error."""
    print(fetch_demo())
    return 0
