"""Whether the deciding core runs as machine code: `NITSUM_COMPILE=1 pip install .` makes it so."""

from __future__ import annotations

from importlib.util import find_spec

ONE_OF_THE_CORE = "nitsum.sched.lane"
"""All of it is compiled, or nothing."""


def core_kind() -> str:
    """`compiled` or `interpreted`; the core itself is not imported to find out."""
    spec = find_spec(ONE_OF_THE_CORE)
    assert spec is not None
    assert spec.origin is not None
    return "interpreted" if spec.origin.endswith(".py") else "compiled"
