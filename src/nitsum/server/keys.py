"""The keys of a running server: found by what callers send, read again when the file changes."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from nitsum.errors import ApiError, ConfigError
from nitsum.server.keyfile import Key, KeyFile, Quota, hash_token, read_file
from nitsum.tier import TierSet

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
"""How soon a change of the file counts."""


_NO_QUOTA = Quota()


class KeyRing:
    """The keys of one file. A file that became unusable changes nothing, and is logged."""

    def __init__(self, path: Path, tiers: TierSet) -> None:
        """Raises `ConfigError` when the file cannot be used."""
        self._path = path
        self._tiers = tiers
        self._next_look_s = 0.0
        self._version = _version(path)
        self._take(read_file(path))

    def find(self, token: str) -> Key:
        """The key a caller sent; raises a 401 unless it is known and valid."""
        self._look()
        key = self._by_hash.get(hash_token(token))
        if key is None:
            raise wrong_key()
        return _checked(key)

    def get(self, key_id: str) -> Key:
        """The key with this id, for work that goes on without its caller; raises a 401 too."""
        self._look()
        key = self._by_id.get(key_id)
        if key is None:
            raise wrong_key("The key of this work does not exist any more.")
        return _checked(key)

    def quota_of(self, tenant: str) -> Quota:
        """What all keys of a tenant may have together."""
        return self._tenants.get(tenant, _NO_QUOTA)

    def reload(self) -> None:
        """Read the file now."""
        try:
            self._version = _version(self._path)
            self._take(read_file(self._path))
        except (ConfigError, OSError) as error:
            _log.error("Keys stay as they were. %s", error)

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _LOOK_EVERY_S
        if _version(self._path) != self._version:
            self.reload()

    def _take(self, file: KeyFile) -> None:
        for key in file.keys:
            self._check_tiers(key)
        self._by_hash = {key.sha256: key for key in file.keys}
        self._by_id = {key.id: key for key in file.keys}
        self._tenants = {tenant.name: tenant for tenant in file.tenants}

    def _check_tiers(self, key: Key) -> None:
        for name in (key.max_tier, key.default_tier):
            if name is not None and name not in self._tiers:
                raise ConfigError(
                    f"{self._path}: {key.id} names the tier {name!r}; this server has "
                    f"{', '.join(self._tiers.names())}."
                )


def wrong_key(message: str = "") -> ApiError:
    return ApiError(
        message or "Wrong or missing API key. Send it as 'Authorization: Bearer KEY'.",
        status=401,
        code="invalid_api_key",
    )


def clamp(tier: str, key: Key | None, tiers: TierSet) -> str:
    """The tier a caller gets who asks for `tier`: no more urgent than its key allows."""
    if key is None or key.max_tier is None:
        return tier
    return max(tier, key.max_tier, key=lambda name: tiers[name].level)


def _checked(key: Key) -> Key:
    problem = key.problem(time.time())
    if problem is not None:
        raise wrong_key(f"This API key {problem}. Ask its issuer for a new one.")
    return key


def _version(path: Path) -> tuple[int, int, int] | None:
    """Differs when the file was replaced or written; None when it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
