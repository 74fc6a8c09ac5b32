"""The layout is the architecture: who may import whom, and where torch may not be."""

import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests.unit.source_tree import SPINE, Import, imports, modules, package_of

# A request goes down this table. A package may import what its line names, and the spine.
MAY_IMPORT: dict[str, set[str]] = {
    SPINE: set(),
    "kv": set(),
    "cost": set(),
    "workload": set(),
    "metrics": set(),
    "ledger": set(),
    "sched": {"kv", "cost"},
    "control": {"kv", "cost"},
    "engine": {"sched", "control", "kv", "cost"},
    "server": {"engine", "ledger", "metrics"},
    "sim": {"engine", "sched", "control", "kv", "cost", "workload", "metrics"},
    "kernels": set(),
    "model": {"kernels"},
    "worker": {"model", "kernels"},
}

# These sit on top: they may import anything, and nothing imports them.
ON_TOP = {"bench", "cli"}

# All the server knows of the engine.
ENGINE_SEEN_BY_SERVER = {"nitsum.engine.client", "nitsum.engine.fake_client"}

NEEDS_TORCH = {"kernels", "model", "worker"}
TORCH_FREE = set(MAY_IMPORT) - NEEDS_TORCH
NOT_WHERE_WE_DECIDE = {"torch", "triton", "flashinfer", "transformers", "accelerate"}


def ours() -> list[Import]:
    return [found for found in imports() if found.imported.split(".")[0] == "nitsum"]


def edges() -> set[tuple[str, str]]:
    pairs = {(package_of(found.importer), package_of(found.imported)) for found in ours()}
    return {(a, b) for a, b in pairs if a != b}


def test_every_package_has_a_place_in_the_table():
    packages = {module.package for module in modules()}
    assert packages <= set(MAY_IMPORT) | ON_TOP, "add the package to MAY_IMPORT"
    assert {SPINE, "kv", "cost", "engine", "cli"} <= packages


def test_every_package_has_an_init():
    """Without one it would be left out of a wheel."""
    folders = {module.path.parent for module in modules()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_packages_import_only_what_they_may():
    wrong = [
        found
        for found in ours()
        if (importer := package_of(found.importer)) not in ON_TOP
        and package_of(found.imported) not in MAY_IMPORT[importer] | {importer, SPINE}
    ]
    assert wrong == []


def test_the_server_sees_the_engine_through_its_client_alone():
    wrong = [
        found
        for found in ours()
        if package_of(found.importer) == "server"
        and package_of(found.imported) == "engine"
        and found.imported not in ENGINE_SEEN_BY_SERVER
    ]
    assert wrong == []


def test_packages_form_no_cycle():
    graph: dict[str, set[str]] = {}
    for importer, imported in edges():
        graph.setdefault(importer, set()).add(imported)
    TopologicalSorter(graph).prepare()


def test_modules_form_no_cycle():
    """Of imports that run; inside a package, two modules may name each other's types."""
    graph: dict[str, set[str]] = {}
    for found in ours():
        if found.types_only:
            continue
        graph.setdefault(found.importer, set()).add(found.imported)
    TopologicalSorter(graph).prepare()


def test_nothing_that_decides_names_torch():
    wrong = [
        found
        for found in imports()
        if package_of(found.importer) in TORCH_FREE
        and found.imported.split(".")[0] in NOT_WHERE_WE_DECIDE
    ]
    assert wrong == []


@pytest.mark.parametrize("package", sorted(TORCH_FREE & {module.package for module in modules()}))
def test_importing_a_package_that_decides_brings_no_torch(package: str):
    """By way of a dependency neither: a fresh process imports all of its modules and looks."""
    names = [module.name for module in modules() if module.package == package]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted({NOT_WHERE_WE_DECIDE!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize("package", sorted(NEEDS_TORCH & {m.package for m in modules()}))
def test_without_torch_one_sentence_says_what_to_install(package: str):
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from nitsum.errors import MissingDependency\n"
        f"try: import nitsum.{package}\n"
        "except MissingDependency as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "PyTorch is not installed: install nitsum[cpu]" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
