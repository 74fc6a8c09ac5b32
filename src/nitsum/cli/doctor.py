"""`nitsum doctor`: what this machine has, what of it is used, what is missing and how to get it.

Works without PyTorch and without a GPU: then it says what that means.
"""

from __future__ import annotations

import argparse
import json
from typing import Literal

from nitsum.cli.machine import Findings, Machine, examine, inspect_machine

_MARKS: dict[Literal["ok", "note", "missing"], str] = {"ok": "+", "note": "-", "missing": "!"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Status 1 if nothing could be served here, on whatever device."""
    machine = inspect_machine()
    findings = examine(machine)
    if args.json:
        print(json.dumps(machine.to_dict() | {"findings": [f.to_dict() for f in findings]}))
    else:
        _print(machine, findings)
    return 0 if machine.packages["torch"] else 1


def _print(machine: Machine, findings: Findings) -> None:
    print(f"python {machine.python} on {machine.platform}, {machine.num_cores} CPU cores")
    print("\nPackages")
    for name, version in machine.packages.items():
        print(f"  {name:20}{version or 'not installed'}")
    if machine.gpus:
        print("\nGPUs")
        for gpu in machine.gpus:
            print(
                f"  {gpu.index}  {gpu.name}, {gpu.memory_mib:,} MiB ({gpu.used_mib:,} in use), "
                f"compute capability {gpu.capability}, driver {gpu.driver}"
            )
        for link in machine.links:
            print(f"  {link}")
    print("\nWill be used")
    for use, name in machine.choices.items():
        print(f"  {use:20}{name}")
    print("\nFindings")
    for finding in findings:
        print(f"  {_MARKS[finding.kind]} {finding.text}")
        if finding.fix:
            print(f"      {finding.fix}")
