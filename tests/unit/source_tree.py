"""Our own source, parsed: what the tests of its structure look at."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nitsum

ROOT = Path(nitsum.__file__).parent
SPINE = "spine"


class Module(NamedTuple):
    name: str
    """Dotted, such as `nitsum.kv.units`."""
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        return package_of(self.name)


class Import(NamedTuple):
    importer: str
    imported: str
    """The module: for `from nitsum.kv import units` it is `nitsum.kv.units`."""
    line: int
    types_only: bool
    """Under `if TYPE_CHECKING:`, hence not there at run time."""


def package_of(name: str) -> str:
    """`kv` for `nitsum.kv.units`, `spine` for what lies directly in `nitsum`."""
    parts = name.split(".")
    if len(parts) == 1 or not (ROOT / parts[1]).is_dir():
        return SPINE
    return parts[1]


@cache
def modules() -> tuple[Module, ...]:
    return tuple(
        Module(_module_name(path), path, ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(ROOT.rglob("*.py"))
    )


def _module_name(path: Path) -> str:
    parts = ["nitsum", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> tuple[Import, ...]:
    """Every import statement, those inside functions and `TYPE_CHECKING` blocks included."""
    return tuple(found for module in modules() for found in imports_of(module))


def imports_of(module: Module) -> Iterator[Import]:
    types_only = _for_types(module.tree)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in _imported(module, node):
                yield Import(module.name, name, node.lineno, node in types_only)


def _imported(module: Module, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    known = {m.name for m in modules()}
    base = _base(module, node)
    for alias in node.names:
        full = f"{base}.{alias.name}"
        yield full if full in known else base


def _for_types(tree: ast.Module) -> set[ast.AST]:
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }


def _base(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    is_package = module.path.name == "__init__.py"
    parts = module.name.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, node.module] if node.module else kept)


def functions() -> Iterator[tuple[Module, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module, node
