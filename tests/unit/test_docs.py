"""What the documentation points at exists."""

import re
from pathlib import Path

import pytest

from tests.unit.source_tree import ROOT

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])

MODULE = re.compile(r"`([\w/.-]+\.py)`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)[^)]*\)|src=\"(?!https?:)([^\"]+)\"")


def test_there_is_documentation():
    assert {page.name for page in PAGES} >= {"README.md", "architecture.md", "glossary.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_named_exist(page: Path):
    named = MODULE.findall(page.read_text(encoding="utf-8"))
    absent = [n for n in named if not (ROOT / n).is_file() and not (REPOSITORY / n).is_file()]
    assert absent == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    links = [one or other for one, other in LINK.findall(page.read_text(encoding="utf-8"))]
    assert [link for link in links if not (page.parent / link).exists()] == []
