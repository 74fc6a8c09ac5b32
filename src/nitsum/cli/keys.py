"""`nitsum keys`: make, list and revoke API keys, limit tenants. A running server sees changes."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Column, Table

from nitsum.errors import ConfigError
from nitsum.server.keyfile import (
    Key,
    KeyFile,
    Tenant,
    change_file,
    change_keys,
    hash_token,
    new_key_id,
    new_token,
    read_file,
    read_keys,
)
from nitsum.tier import SERVICE_TIERS

_UNITS_S = {"h": 3600, "d": 86_400, "w": 7 * 86_400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="add|limit|list|revoke")
    add = actions.add_parser("add", help="make a key and print it, once")
    _add_rights(add)
    limit = actions.add_parser(
        "limit", help="say what all keys of a tenant may have together; without limits: no limit"
    )
    limit.add_argument("tenant", help="the tenant of the keys")
    _add_limits(limit)
    listing = actions.add_parser("list", help="show the keys; what is shown opens nothing")
    listing.add_argument("--json", action="store_true", help="as JSON")
    revoke = actions.add_parser("revoke", help="make a key useless from now on")
    revoke.add_argument("id", help="as `list` shows it")
    for one in (add, limit, listing, revoke):
        one.add_argument(
            "--keys",
            metavar="FILE",
            default=os.environ.get("NITSUM_KEYS"),
            help="the key file (default: $NITSUM_KEYS)",
        )


def _add_rights(add: argparse.ArgumentParser) -> None:
    add.add_argument("--tenant", default="", help="who uses and pays for it")
    add.add_argument("--note", default="", help="what you want to remember about it")
    add.add_argument("--max-tier", metavar="TIER", help="the most urgent tier it may have")
    add.add_argument("--default-tier", metavar="TIER", help="what service_tier auto means for it")
    _add_limits(add)
    add.add_argument("--budget", type=_money, metavar="MONEY", help="what it may spend in all")
    add.add_argument("--expires", type=_moment, metavar="WHEN", help="12h, 30d, or 2030-01-31")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rpm", type=_count, metavar="N", help="requests a minute")
    parser.add_argument("--tpm", type=_count, metavar="N", help="tokens a minute")
    parser.add_argument("--concurrency", type=_count, metavar="N", help="requests at a time")


def run(args: argparse.Namespace) -> int:
    if args.keys is None:
        raise ConfigError("Name the key file: --keys FILE, or NITSUM_KEYS=FILE.")
    actions = {"add": _add, "limit": _limit, "list": _list, "revoke": _revoke}
    return actions[args.action](args, Path(args.keys))


def _add(args: argparse.Namespace, path: Path) -> int:
    token = new_token()
    key = Key(
        id=new_key_id(),
        sha256=hash_token(token),
        tenant=args.tenant,
        note=args.note,
        max_tier=args.max_tier,
        default_tier=args.default_tier,
        rpm=args.rpm,
        tpm=args.tpm,
        concurrency=args.concurrency,
        budget=args.budget,
        created_s=int(time.time()),
        expires_s=args.expires,
    )
    change_keys(path, lambda keys: [*keys, key])
    for name in (key.max_tier, key.default_tier):
        if name is not None and name not in SERVICE_TIERS:
            print(f"Note: {name!r} is none of the usual tiers; servers without it refuse the file.")
    print(f"{key.id}: send it as 'Authorization: Bearer ...'. It is shown this once:\n\n{token}")
    return 0


def _limit(args: argparse.Namespace, path: Path) -> int:
    limits = Tenant(name=args.tenant, rpm=args.rpm, tpm=args.tpm, concurrency=args.concurrency)
    is_limited = limits != Tenant(name=args.tenant)

    def change(file: KeyFile) -> KeyFile:
        if args.tenant not in {key.tenant for key in file.keys} - {""}:
            raise ConfigError(f"No key in {path} is of a tenant {args.tenant!r}.")
        others = [tenant for tenant in file.tenants if tenant.name != args.tenant]
        return KeyFile(file.keys, [*others, limits] if is_limited else others)

    read_keys(path)
    change_file(path, change)
    print(f"{args.tenant}: " + ("limited together." if is_limited else "not limited together."))
    return 0


def _list(args: argparse.Namespace, path: Path) -> int:
    file = read_file(path)
    if args.json:
        hidden = [msgspec.structs.replace(key, sha256=key.sha256[:8]) for key in file.keys]
        shown = {
            "keys": [msgspec.structs.asdict(key) for key in hidden],
            "tenants": [msgspec.structs.asdict(tenant) for tenant in file.tenants],
        }
        print(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
        return 0
    # The id is what `revoke` takes: it has to be whole.
    table = Table(
        Column("id", no_wrap=True),
        "tenant",
        "state",
        "tiers",
        "rpm",
        "tpm",
        "at a time",
        "budget",
        "note",
    )
    for key in file.keys:
        table.add_row(*_row(key))
    Console().print(table)
    if file.tenants:
        _print_tenants(file.tenants)
    return 0


def _print_tenants(tenants: list[Tenant]) -> None:
    table = Table("all keys of", "rpm", "tpm", "at a time")
    for tenant in tenants:
        table.add_row(tenant.name, *_shown(tenant.rpm, tenant.tpm, tenant.concurrency))
    Console().print(table)


def _row(key: Key) -> tuple[str, ...]:
    tiers = f"{key.default_tier or 'auto'}, at most {key.max_tier or 'any'}"
    limits = _shown(key.rpm, key.tpm, key.concurrency, key.budget)
    return (key.id, key.tenant or "-", _state(key), tiers, *limits, key.note)


def _shown(*limits: float | None) -> list[str]:
    return ["-" if limit is None else f"{limit:g}" for limit in limits]


def _state(key: Key) -> str:
    problem = key.problem(time.time())
    if problem is not None:
        return problem.removeprefix("has ").removeprefix("been ")
    if key.expires_s is None:
        return "valid"
    until = datetime.datetime.fromtimestamp(key.expires_s)
    return f"until {until:%Y-%m-%d %H:%M}"


def _revoke(args: argparse.Namespace, path: Path) -> int:
    def without(keys: list[Key]) -> list[Key]:
        if args.id not in {key.id for key in keys}:
            raise ConfigError(f"There is no key {args.id!r} in {path}. See nitsum keys list.")
        return [_revoked(key) if key.id == args.id else key for key in keys]

    read_keys(path)
    change_keys(path, without)
    print(f"{args.id} is revoked.")
    return 0


def _revoked(key: Key) -> Key:
    if key.revoked_s is not None:
        return key
    return msgspec.structs.replace(key, revoked_s=int(time.time()))


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) < 2**53:
        raise argparse.ArgumentTypeError("a whole number of at least 1 is expected")
    return int(text)


def _money(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise argparse.ArgumentTypeError("an amount of at least 0 is expected, such as 25 or 0.5")
    return amount


def _moment(text: str) -> int:
    """A time from now, or the start of a day here; Unix seconds."""
    match = re.fullmatch(r"(\d+)([hdw])", text)
    if match is not None:
        return int(time.time()) + int(match[1]) * _UNITS_S[match[2]]
    try:
        return int(datetime.datetime.fromisoformat(text).timestamp())
    except ValueError:
        raise argparse.ArgumentTypeError("12h, 30d, 2w or a date is expected") from None
