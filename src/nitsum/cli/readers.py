"""From what somebody wrote (a flag, a YAML value, a variable) to a checked value.

A reader takes a string or a YAML value and returns the value, or raises `ValueError` with the end
of a sentence: what is expected.
"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import yaml

from nitsum.errors import ConfigError

T = TypeVar("T")
Reader = Callable[[object], T]

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_FILES = (".yaml", ".yml", ".json")
_WEIGHTS_EXPECTED = "weights by tier are expected, such as priority=1,default=3"
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True}
_BOOLEANS |= {"false": False, "no": False, "off": False, "0": False}


def text(value: object) -> str:
    """Any text that is not empty."""
    if isinstance(value, str) and value.strip():
        return value
    raise ValueError("some text is expected")


def http_url(value: object) -> str:
    """The address of a service."""
    try:
        parts = urlsplit(text(value))
    except ValueError:  # an address in brackets that has no end
        parts = urlsplit("")
    if parts.scheme in ("http", "https") and parts.netloc:
        return parts.geturl()
    raise ValueError("a URL such as http://127.0.0.1:4318 is expected")


def whole_number(at_least: int = 0, at_most: int | None = None) -> Reader[int]:
    """An integer within bounds."""

    def read(value: object) -> int:
        number = _as_int(value)
        if number is None or number < at_least or (at_most is not None and number > at_most):
            upper = "" if at_most is None else f" and at most {at_most}"
            raise ValueError(f"a whole number of at least {at_least}{upper} is expected")
        return number

    return read


def _as_int(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def seconds(value: object) -> float:
    """A duration in seconds."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            duration_s = float(value)
        except ValueError:
            duration_s = -1.0
        if 0 <= duration_s < float("inf"):
            return duration_s
    raise ValueError("a number of seconds is expected, such as 30 or 0.5")


def amount(value: object) -> float:
    """An amount of money that is not negative."""
    try:
        return seconds(value)
    except ValueError:
        raise ValueError("an amount of at least 0 is expected, such as 2 or 0.15") from None


def number(value: object) -> float:
    """A number above 0."""
    try:
        found = float(str(value))
    except ValueError:
        found = 0.0
    if 0.0 < found < float("inf"):
        return found
    raise ValueError("a number above 0 is expected")


def weights(value: object) -> tuple[tuple[str, float], ...]:
    """Weights by tier: `priority=1,default=3`, a mapping, or a YAML file that holds one."""
    if isinstance(value, str) and Path(value).suffix.lower() in _FILES:
        value = load_yaml(Path(value))
        _check_weights_file(value)
    elif isinstance(value, str) and "=" in value:
        pairs = [entry.partition("=") for entry in value.split(",")]
        value = {name.strip(): weight for name, _, weight in pairs}
    if not isinstance(value, dict) or not value:
        raise ValueError(_WEIGHTS_EXPECTED)
    mapping = cast(dict[object, object], value)
    return tuple((str(name), number(weight)) for name, weight in mapping.items())


def _check_weights_file(content: object) -> None:
    """Files that are easily taken for one of weights."""
    if isinstance(content, dict) and "streams" in content:
        raise ValueError(f"{_WEIGHTS_EXPECTED} (a mix is given as --trace mix:FILE)")
    if isinstance(content, list):
        raise ValueError(f"{_WEIGHTS_EXPECTED} (a list of tiers is for `nitsum serve --tiers`)")


def size_bytes(value: object) -> int:
    """A size: bytes as a number, or with a unit, such as 256MiB."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("a size is expected, such as 256MiB or 8GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def boolean(value: object) -> bool:
    """Yes or no."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _BOOLEANS:
        return _BOOLEANS[value.strip().lower()]
    raise ValueError("true or false is expected")


def one_of(*choices: str, elsewhere: Mapping[str, str] | None = None) -> Reader[Any]:
    """One of the given words (typed `Any` because a `Literal` cannot be passed as a type).

    `elsewhere` has words that another flag is for, with that flag.
    """

    def read(value: object) -> str:
        if isinstance(value, str) and value in choices:
            return value
        flag = (elsewhere or {}).get(str(value))
        hint = f" ({value} is said with {flag})" if flag else ""
        raise ValueError(f"one of {', '.join(choices)} is expected{hint}")

    return read


def entries(value: object) -> tuple[object, ...]:
    """A list: given as such in YAML, as the name of a YAML or JSON file, or comma-separated."""
    if isinstance(value, list) and value:
        return tuple(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a list, the name of a YAML file, or comma-separated entries are expected")
    if Path(value).suffix.lower() in _FILES:
        return _entries_of_file(Path(value))
    return tuple(entry.strip() for entry in value.split(",") if entry.strip())


def _entries_of_file(path: Path) -> tuple[object, ...]:
    content = load_yaml(path)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} should hold a list that is not empty")
    return tuple(content)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def load_yaml(path: Path) -> Any:
    """What a YAML (or JSON) file holds; `ValueError` when it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def flag(read: Reader[T]) -> Callable[[str], T]:
    """A reader as the type of a flag: what is wrong is said in its words."""

    def convert(value: str) -> T:
        try:
            return read(value)
        except ValueError as error:
            raise ArgumentTypeError(f"{error}, not {value!r}") from None

    return convert


def check_positive(args: Namespace, *names: str) -> None:
    """Raises `ConfigError` for the first flag of `names` that is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")
