"""Small functions and small files, held to numbers."""

import statistics

from tests.unit.source_tree import functions, modules

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
SHARE_OF_SHORT_FUNCTIONS = 0.97


def function_lengths() -> dict[str, int]:
    return {
        f"{module.name}:{node.name}:{node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for module, node in functions()
    }


def test_files_are_short():
    lengths = {m.name: len(m.path.read_text(encoding="utf-8").splitlines()) for m in modules()}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short():
    lengths = function_lengths()
    long = {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES}
    assert len(long) <= (1 - SHARE_OF_SHORT_FUNCTIONS) * len(lengths), long


def test_a_typical_function_fits_ten_lines():
    assert statistics.median(function_lengths().values()) < 10
