"""Settings: each declared once, readable from the command line, a YAML file and the environment.

A settings class is a frozen dataclass whose fields are made by `setting()`. From that declaration
come the long flag (`max_num_seqs` is `--max-num-seqs`), the key of the YAML file (`max-num-seqs`)
and the variable (`NITSUM_MAX_NUM_SEQS`). Command line beats file beats environment beats default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from nitsum.cli.readers import Reader, boolean, load_yaml
from nitsum.errors import ConfigError

T = TypeVar("T")
S = TypeVar("S")

PREFIX = "NITSUM_"
OTHER_VARIABLES = frozenset({"NITSUM_CACHE", "NITSUM_CONFIG"})
"""Variables with our prefix that are no setting."""


@dataclass(frozen=True)
class _Meta:
    read: Reader[Any]
    help: str
    metavar: str
    positional: bool


@dataclass(frozen=True)
class Given:
    """A value somebody wrote, and where, in words that help to find it again."""

    value: object
    where: str


def setting(
    read: Reader[T], default: T, help: str, metavar: str = "", *, positional: bool = False
) -> T:
    """A field of a settings class: how to read it, its default, one line of help."""
    meta = _Meta(read, help, metavar, positional)
    return cast(T, dataclasses.field(default=default, metadata={"setting": meta}))


def _metas(cls: type[Any]) -> dict[str, _Meta]:
    """Key (the long flag without dashes) to declaration, in order."""
    return {
        field.name.replace("_", "-"): field.metadata["setting"] for field in dataclasses.fields(cls)
    }


def keys(cls: type[Any]) -> tuple[str, ...]:
    """The YAML keys of a settings class."""
    return tuple(_metas(cls))


# --- the command line --------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, cls: type[Any], *, config: bool = True) -> None:
    """One flag for each setting (absent from the namespace when not given), and `--config`."""
    if config:
        parser.add_argument(
            "--config", metavar="FILE", help="YAML file; its keys are the long flag names"
        )
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for key, meta in _metas(cls).items():
        _add_flag(parser, key, meta, defaults[key.replace("-", "_")])


def _add_flag(parser: argparse.ArgumentParser, key: str, meta: _Meta, default: object) -> None:
    help_text = meta.help.replace("%", "%%")
    if default not in (None, "", ()) and "default" not in help_text:
        help_text += f" (default: {str(default).lower() if default in (True, False) else default})"
    if meta.positional:
        parser.add_argument(
            key,
            nargs="?",
            default=argparse.SUPPRESS,
            metavar=meta.metavar or key.upper(),
            help=help_text,
        )
    elif meta.read is boolean:
        parser.add_argument(
            f"--{key}",
            default=argparse.SUPPRESS,
            action=argparse.BooleanOptionalAction,
            help=help_text,
        )
    else:
        parser.add_argument(
            f"--{key}",
            default=argparse.SUPPRESS,
            metavar=meta.metavar or key.split("-")[-1].upper(),
            help=help_text,
        )


# --- the three sources -------------------------------------------------------------------------


def from_flags(cls: type[Any], args: argparse.Namespace) -> dict[str, Given]:
    """What was given on the command line."""
    named = vars(args)
    return {
        key: Given(named[_attribute(key, meta)], key.upper() if meta.positional else f"--{key}")
        for key, meta in _metas(cls).items()
        if _attribute(key, meta) in named
    }


def _attribute(key: str, meta: _Meta) -> str:
    return key if meta.positional else key.replace("-", "_")


def from_file(cls: type[Any], path: str | None) -> tuple[dict[str, Given], list[str]]:
    """What a YAML file says, and what is wrong with it."""
    if path is None:
        return {}, []
    try:
        content = load_yaml(Path(path))
    except ValueError as error:
        return {}, [f"--config: {error}."]
    if content is None:
        return {}, []
    if not isinstance(content, dict):
        return {}, [f"{path}: expected lines of the form `key: value`."]
    given = {
        str(k): Given(v, f"{path}: {k}") for k, v in cast(dict[object, object], content).items()
    }
    known = {key: given[key] for key in given if key in _metas(cls)}
    return known, [_unknown_key(path, key, keys(cls)) for key in given if key not in known]


def _unknown_key(path: str, key: str, known: Iterable[str]) -> str:
    return f"{path}: unknown key {key!r}.{did_you_mean(key.replace('_', '-'), known)}"


def from_environment(
    cls: type[Any], environment: Mapping[str, str]
) -> tuple[dict[str, Given], list[str]]:
    """What `NITSUM_*` variables say, and those that look like misspelt settings.

    Other variables with the prefix are left alone: Kubernetes sets some for a service of our name.
    """
    by_variable = {variable(key): key for key in _metas(cls)}
    given: dict[str, Given] = {}
    problems: list[str] = []
    for name, value in environment.items():
        if name in by_variable:
            given[by_variable[name]] = Given(value, name)
        elif name.startswith(PREFIX) and name not in OTHER_VARIABLES:
            hint = did_you_mean(name, by_variable, cutoff=0.9)
            problems += [f"Unknown variable {name}.{hint}"] if hint else []
    return given, problems


def variable(key: str) -> str:
    """The environment variable of a key."""
    return PREFIX + key.replace("-", "_").upper()


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """` Did you mean ...?` or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {matches[0]!r}?" if matches else ""


# --- together ----------------------------------------------------------------------------------


def resolve(
    cls: type[S], args: argparse.Namespace, environment: Mapping[str, str]
) -> tuple[S, list[str]]:
    """The settings, and everything that is wrong with them (defaults stand in for those)."""
    path = getattr(args, "config", None) or environment.get("NITSUM_CONFIG")
    in_environment, environment_problems = from_environment(cls, environment)
    in_file, file_problems = from_file(cls, path)
    given = {**in_environment, **in_file, **from_flags(cls, args)}
    problems = environment_problems + file_problems
    values: dict[str, object] = {}
    for key, entry in given.items():
        try:
            values[key.replace("-", "_")] = _metas(cls)[key].read(entry.value)
        except ValueError as error:
            problems.append(_bad_value(entry, error))
    return cls(**values), problems


def _bad_value(given: Given, error: ValueError) -> str:
    hint = ""
    if given.where.startswith(PREFIX) and str(given.value).startswith("tcp://"):
        hint = (
            " Kubernetes sets this variable for a service of this name: rename the service or set "
            "enableServiceLinks: false."
        )
    return f"{given.where}: {error}, not {given.value!r}.{hint}"


def settings_or_error(cls: type[S], args: argparse.Namespace, environment: Mapping[str, str]) -> S:
    """The settings; a `ConfigError` that lists every problem if there is one."""
    found, problems = resolve(cls, args, environment)
    if problems:
        raise ConfigError("\n".join(problems))
    return found
