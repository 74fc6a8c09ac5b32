"""The build backend: setuptools, which compiles the deciding core into wheels if it is told to.

    NITSUM_COMPILE=1 pip install .

mypyc turns the modules of `tool.nitsum.core` in pyproject.toml into machine code. Their sources run
as well without, and are in the wheel beside what was made of them. Needs a C compiler and Python's
headers.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that are as they are

if TYPE_CHECKING:
    from setuptools import Extension

VARIABLE = "NITSUM_COMPILE"
REQUIRES = ["mypy>=2.4,<3", "msgspec>=0.19"]
"""msgspec for the types of what the core is given."""


YES, NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def is_wanted() -> bool:
    """Ends the build where it is not clear."""
    word = os.environ.get(VARIABLE, "")
    if word.lower() not in (*YES, *NO):
        raise SystemExit(f"{VARIABLE}={word} is neither yes nor no: set it to 1 or 0.")
    return word.lower() in YES


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Beside setuptools; `setup.py` has no wishes of its own."""
    return list(REQUIRES) if is_wanted() else []


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    """As setuptools builds it, of what is there: it would pack what earlier builds left, too."""
    for left in Path("build").glob("lib*"):
        shutil.rmtree(left)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    """As setuptools builds it: machine code would be run in place of sources that change."""
    if is_wanted():
        raise SystemExit(f"An editable installation is not compiled: drop -e, or {VARIABLE}=1.")
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def sources() -> list[str]:
    """Files of the modules to compile."""
    settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    return [f"src/nitsum/{module}.py" for module in settings["tool"]["nitsum"]["core"]]


def check_compiler() -> None:
    """Ends the build with what to install, where something is missing."""
    compiler = os.environ.get("CC", sysconfig.get_config_var("CC") or "cc").split()[0]
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [] if shutil.which(compiler) else [f"the C compiler {compiler}"]
    missing += [] if header.exists() else [str(header)]
    if missing:
        raise SystemExit(
            f"Compiling the core needs {' and '.join(missing)}. On Debian and Ubuntu: apt-get "
            f"install gcc python3-dev. Without {VARIABLE}, Nitsum does the same, slower."
        )


def extensions() -> list[Extension]:
    """What to compile for a wheel; nothing unless it is wanted."""
    if not is_wanted() or "bdist_wheel" not in sys.argv:
        return []
    from mypyc.build import mypycify

    check_compiler()
    built = mypycify(
        ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent", *sources()],
        opt_level="2",
        debug_level="0",
        multi_file=True,
        group_name="nitsum_core",
    )
    for extension in built:  # a product and a sum in one rounding would be another result
        extension.extra_compile_args.append("-ffp-contract=off")
    return built
