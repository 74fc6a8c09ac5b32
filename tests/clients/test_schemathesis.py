"""The server against its own description: generated requests, valid ones and broken ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance"
)


def test_it_keeps_to_its_description(quick, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    command = [str(program), "run", f"{quick.url}/openapi.json", "--checks", CHECKS]
    limits = ["--max-examples", os.environ.get("NITSUM_FUZZ_EXAMPLES", "40"), "--seed", "1"]
    flags = ["--request-timeout", "120", "--phases", "examples,coverage,fuzzing"]
    done = subprocess.run(
        [*command, *limits, *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
