"""`nitsum plans`: draw the plans a server would hold ready."""

from __future__ import annotations

import argparse
import os

from nitsum.cli.build import build_plans
from nitsum.cli.drawing import draw_plan_set
from nitsum.cli.settings import PlanSettings
from nitsum.cli.sources import add_flags, settings_or_error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, PlanSettings, config=False)


def run(args: argparse.Namespace) -> int:
    """Print one drawing a plan."""
    print(draw_plan_set(build_plans(settings_or_error(PlanSettings, args, os.environ))))
    return 0
