"""API keys at rest: a JSON file with the hash of each key and what it and its tenant may do.

A key is 256 random bits, so one round of SHA-256 is enough: nobody can try 2^256 inputs, however
fast the hash. Slow hashes (scrypt, bcrypt) protect what people choose; here they would add tens of
milliseconds to each request and protect nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from nitsum.errors import ConfigError

TOKEN_PREFIX = "nk-"
_ID_PREFIX = "key_"


class Quota(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """How much of the server one may have. None is "no limit"."""

    rpm: int | None = None
    """Requests a minute."""
    tpm: int | None = None
    """Tokens a minute, prompts and answers together."""
    concurrency: int | None = None
    """Requests at a time."""


class Tenant(Quota, frozen=True, kw_only=True):
    """What all keys of one tenant may have together, beside what each may have alone."""

    name: str


class Key(Quota, frozen=True, kw_only=True):
    """What one key may do. None is "no limit" everywhere; times are Unix seconds."""

    id: str
    sha256: str
    """Of the token, hexadecimal."""
    tenant: str = ""
    note: str = ""
    max_tier: str | None = None
    """The most urgent tier it may be served as."""
    default_tier: str | None = None
    """What `service_tier: auto` means for it; None: what it means for the server."""
    budget: float | None = None
    """Money it may spend in all, in the currency of the token prices, credits given back."""
    created_s: int = 0
    expires_s: int | None = None
    revoked_s: int | None = None

    def problem(self, now_s: float) -> str | None:
        """Why it opens nothing at this time."""
        if self.revoked_s is not None:
            return "has been revoked"
        if self.expires_s is not None and now_s >= self.expires_s:
            return "has expired"
        return None


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[Key] = []
    tenants: list[Tenant] = []
    """Those that have limits of their own."""


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def new_token() -> str:
    """A key as its owner gets to see it, once."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def new_key_id() -> str:
    return _ID_PREFIX + secrets.token_hex(8)


def read_keys(path: Path) -> list[Key]:
    """The keys of a file; raises `ConfigError` when it cannot be used."""
    return read_file(path).keys


def read_file(path: Path) -> KeyFile:
    """All that a file says; raises `ConfigError` when it cannot be used."""
    try:
        file = msgspec.json.decode(path.read_bytes(), type=KeyFile)
    except FileNotFoundError:
        raise ConfigError(
            f"There is no key file {path}. Make one: nitsum keys add --keys {path} --tenant NAME"
        ) from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The key file {path} cannot be used: {error}.") from error
    _check_unique(path, file)
    return file


def _check_unique(path: Path, file: KeyFile) -> None:
    for what, name in (("keys", "id"), ("keys", "sha256"), ("tenants", "name")):
        values = [getattr(entry, name) for entry in getattr(file, what)]
        if len(set(values)) != len(values):
            raise ConfigError(f"The key file {path} has two {what} with one {name}. Remove one.")


def change_keys(path: Path, change: Callable[[list[Key]], list[Key]]) -> None:
    """Replace the file's keys by `change(keys)`; see `change_file`."""
    change_file(path, lambda file: KeyFile(change(file.keys), file.tenants))


def change_file(path: Path, change: Callable[[KeyFile], KeyFile]) -> None:
    """Replace the file by `change(file)`, whole or not at all.

    Two commands at once wait for each other; a server that reads meanwhile sees the old file or
    the new one. Only the owner may read it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(path.name + ".lock")):
        file = change(read_file(path) if path.exists() else KeyFile())
        _check_unique(path, file)
        _replace(path, msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
