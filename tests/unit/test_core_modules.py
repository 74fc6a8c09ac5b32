"""What is compiled is such as mypyc can compile, and the build says what it lacks."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from nitsum.compiled import ONE_OF_THE_CORE
from tests.unit.source_tree import Module, modules

REPOSITORY = Path(__file__).parents[2]
SETTINGS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
CORE = ["nitsum." + name.replace("/", ".") for name in SETTINGS["tool"]["nitsum"]["core"]]


def classes(module: Module) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef))


def bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).split(".")[-1] for base in node.bases]


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_every_module_of_the_core_exists_and_is_named_once():
    assert set(CORE) <= {module.name for module in modules()}
    assert len(set(CORE)) == len(CORE)
    assert ONE_OF_THE_CORE in CORE


def test_no_message_type_is_in_the_core():
    """msgspec reads annotations, which a compiled class does not have as they were written."""
    inside = [module for module in modules() if module.name in CORE]
    assert [n.name for m in inside for n in classes(m) if "Struct" in bases(n)] == []


def test_no_class_outside_derives_from_one_of_the_core():
    """Compiled classes cannot be derived from."""
    core = {n.name for m in modules() if m.name in CORE for n in classes(m)}
    outside = [(m.name, n) for m in modules() if m.name not in CORE for n in classes(m)]
    assert [(name, n.name) for name, n in outside if core.intersection(bases(n))] == []


def test_no_dataclass_of_the_core_derives_from_one_outside():
    """What `dataclass` makes of a compiled class does not go with an interpreted base."""
    plain = {n.name for m in modules() if m.name not in CORE for n in classes(m)}
    plain -= {n.name for m in modules() if m.name in CORE for n in classes(m)}
    made = [n for m in modules() if m.name in CORE for n in classes(m) if is_dataclass(n)]
    assert made
    assert [n.name for n in made if plain.intersection(bases(n))] == []


# --- the build -----------------------------------------------------------------------------------


def build(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs code beside the build backend, in a process of its own: setuptools replaces modules."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("builds need setuptools")
    known = {name: value for name, value in os.environ.items() if name != "NITSUM_COMPILE"}
    return subprocess.run(
        [sys.executable, "-c", f"import sys; from core_build import *; {code}"],
        capture_output=True,
        text=True,
        env=known | {"PYTHONPATH": str(REPOSITORY / "deploy/wheel")} | variables,
        check=False,
    )


WISHES = ["get_requires_for_build_wheel()", "extensions()"]


@pytest.mark.parametrize("word", [None, "", "0", "no", "False", "off"])
def test_nothing_is_compiled_or_fetched_for_it_unless_asked(word: str | None):
    variables = {} if word is None else {"NITSUM_COMPILE": word}
    code = f"sys.argv.append('bdist_wheel'); print({', '.join(WISHES)})"
    assert build(code, **variables).stdout == "[] []\n"


@pytest.mark.parametrize("word", ["1", "yes", "True", "on"])
def test_whoever_asks_gets_the_compiler_of_the_core(word: str):
    asked = build("print(get_requires_for_build_wheel())", NITSUM_COMPILE=word)
    assert "'mypy>=" in asked.stdout


@pytest.mark.parametrize("wish", WISHES)
def test_a_word_that_is_neither_yes_nor_no_ends_the_build(wish: str):
    done = build(wish, NITSUM_COMPILE="maybe")
    assert done.returncode != 0
    assert "NITSUM_COMPILE=maybe" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_edited_in_place_is_not_compiled():
    done = build("build_editable('nowhere')", NITSUM_COMPILE="1")
    assert done.returncode != 0
    assert "drop -e" in done.stderr


def test_without_a_c_compiler_the_build_says_what_to_install():
    done = build("check_compiler()", CC="no-such-compiler -O2")
    assert done.returncode != 0
    assert "the C compiler no-such-compiler" in done.stderr
    assert "apt-get install gcc" in done.stderr
