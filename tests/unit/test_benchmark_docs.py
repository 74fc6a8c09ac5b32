"""`docs/benchmarks.md` says what the published results say, and hides none of them."""

import re

import pytest

from benchmarks.page import CITED, PAGE, ROOT, filled, like, outcome

TEXT = PAGE.read_text(encoding="utf-8")
RESULTS = sorted(path.name for path in (ROOT / "benchmarks" / "results").iterdir())


def test_every_figure_is_its_summarys():
    assert filled(TEXT).splitlines() == TEXT.splitlines(), "python -m benchmarks.page mends it"


@pytest.mark.parametrize("result", RESULTS)
def test_every_published_result_is_linked(result: str):
    assert f"(../benchmarks/results/{result}/summary.json" in TEXT


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        (r"(?<=\| )\d+\.\d\d(?= \|)", "0.07"),
        (r"\| \*\*missed\*\* by", "| met by"),
        (r'(?<=\d)(?=\.\d+\]\(\S+ "\w+"\))', "7"),
        (r"(?<=summary\.json\), )2026", "2025"),
    ],
    ids=["cell", "outcome", "cited", "date"],
)
def test_what_is_wrong_is_mended(said: str, instead: str):
    wrong = re.sub(said, instead, TEXT, count=1)
    assert wrong != TEXT
    assert filled(wrong) == filled(TEXT)


def test_a_figure_nobody_measured_is_an_error():
    cited = CITED.search(TEXT)
    assert cited is not None
    with pytest.raises(KeyError, match="no_such_figure"):
        filled(TEXT.replace(f'"{cited[3]}"', '"no_such_figure"', 1))


def test_every_target_has_an_outcome():
    rows = [line for line in TEXT.splitlines() if re.search(r"\| at (most|least) ", line)]
    assert len(rows) > 30
    assert [row for row in rows if not re.search(r"\| (met|\*\*missed\*\*)[^|]*\|$", row)] == []


@pytest.mark.parametrize(
    ("shown", "value", "expected"),
    [
        ("0.00", 1.2549, "1.25"),
        ("1,000", 7746.86, "7,747"),
        ("0.0%", 0.9742, "97.4%"),
        ("0e0", 6.14e-8, "6.1e-08"),
    ],
)
def test_decimals_are_those_that_stand_there(shown: str, value: float, expected: str):
    assert like(shown, value) == expected


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    [
        (52.5, "at most 50 ms", "**missed** by 5.0%"),
        (45.0, "at most 50 ms", "met by 10.0%"),
        (0.96, "at least 1.0", "**missed** by 4.0%"),
        (36.7, "at most 1 ms", "**missed**, 36.7 times it"),
        (0, "at most 0", "met"),
        (1, "at most 0", "**missed**"),
        (3.0, "", ""),
    ],
)
def test_outcome(value: float, target: str, expected: str):
    assert outcome(value, target) == expected
