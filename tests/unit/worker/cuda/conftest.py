"""Kernels in Triton's interpreter where there is no GPU; not at all without Triton."""

from importlib.util import find_spec

if find_spec("triton") is None:
    collect_ignore = ["test_lane.py", "test_grammar.py", "test_host.py"]
else:
    import tests.unit.kernels.conftest  # noqa: F401  sets the interpreter up
