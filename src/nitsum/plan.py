"""Groups, lanes and plans: parallel layouts as plain data.

A *group* is an aligned power-of-two set of ranks, a *lane* is a group with a role and tiers, a
*plan* is a set of lanes. Lanes of one plan may share ranks (an overlay) as long as no two lanes
are the same group.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal, get_args

import msgspec

from nitsum.errors import ConfigError

Role = Literal["mixed", "prefill", "decode"]


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def bit_reverse(value: int, num_bits: int) -> int:
    """`value` with its lowest `num_bits` bits in opposite order."""
    reversed_value = 0
    for _ in range(num_bits):
        reversed_value = reversed_value << 1 | value & 1
        value >>= 1
    return reversed_value


class Group(msgspec.Struct, frozen=True, array_like=True, order=True, cache_hash=True):
    """Ranks `index * degree .. (index + 1) * degree - 1`, working at TP `degree`."""

    degree: int
    index: int

    @property
    def ranks(self) -> range:
        return _aligned(self.degree, self.index)

    @property
    def leader(self) -> int:
        """The rank that samples for the group and reports its steps."""
        return self.index * self.degree

    def shard_of(self, rank: int) -> int:
        """The shard at this degree that `rank` holds.

        Bit-reversed order: the shard a rank takes at degree 2t lies inside the one it takes at
        degree t, so going to a higher degree needs no weights that the rank lacks.
        """
        return bit_reverse(rank % self.degree, self.degree.bit_length() - 1)

    def rank_of_shard(self, shard: int) -> int:
        return self.leader + bit_reverse(shard, self.degree.bit_length() - 1)

    def overlaps(self, other: Group) -> bool:
        return self.ranks.start < other.ranks.stop and other.ranks.start < self.ranks.stop

    @property
    def name(self) -> str:
        return _group_name(self.degree, self.index)

    def __str__(self) -> str:
        return _group_name(self.degree, self.index)


@cache
def _aligned(degree: int, index: int) -> range:
    return range(index * degree, (index + 1) * degree)


@cache
def _group_name(degree: int, index: int) -> str:
    first, last = index * degree, (index + 1) * degree - 1
    return f"TP{degree}@{first}" if first == last else f"TP{degree}@{first}-{last}"


@cache
def all_groups(num_ranks: int, min_degree: int = 1) -> tuple[Group, ...]:
    """Every aligned group, widest first, in the one order in which anything is made for them."""
    groups: list[Group] = []
    degree = num_ranks
    while degree >= min_degree:
        groups.extend(Group(degree, index) for index in range(num_ranks // degree))
        degree //= 2
    return tuple(groups)


class Lane(msgspec.Struct, frozen=True):
    """A group that runs steps: its role, and the tiers it prefers (none named: all)."""

    group: Group
    role: Role = "mixed"
    tiers: tuple[str, ...] = ()

    @property
    def degree(self) -> int:
        return self.group.degree

    @property
    def ranks(self) -> range:
        return self.group.ranks

    def serves(self, tier: str) -> bool:
        return not self.tiers or tier in self.tiers

    def __str__(self) -> str:
        return str(self.group)


class Plan(msgspec.Struct, frozen=True):
    """A named set of lanes."""

    name: str
    lanes: tuple[Lane, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(lane.group for lane in self.lanes)

    @property
    def has_roles(self) -> bool:
        """Requests are handed over between its lanes."""
        return any(lane.role != "mixed" for lane in self.lanes)

    @property
    def followers(self) -> tuple[Lane, ...]:
        """The lanes in which answers go on after a prefill lane."""
        return tuple(lane for lane in self.lanes if lane.role != "prefill")

    @property
    def is_overlay(self) -> bool:
        groups = self.groups
        return any(a.overlaps(b) for i, a in enumerate(groups) for b in groups[i + 1 :])

    def lane_of(self, group: Group) -> Lane | None:
        return next((lane for lane in self.lanes if lane.group == group), None)


class PlanSet(msgspec.Struct, frozen=True):
    """The plans that are resident at once, and what their union needs."""

    num_ranks: int
    plans: tuple[Plan, ...]
    initial: str

    @property
    def degrees(self) -> tuple[int, ...]:
        return tuple(sorted({lane.degree for plan in self.plans for lane in plan.lanes}))

    @property
    def max_tp(self) -> int:
        return self.degrees[-1]

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups any plan uses, in `all_groups` order."""
        used = {group for plan in self.plans for group in plan.groups}
        return tuple(group for group in all_groups(self.num_ranks) if group in used)

    def __getitem__(self, name: str) -> Plan:
        for plan in self.plans:
            if plan.name == name:
                return plan
        known = ", ".join(plan.name for plan in self.plans)
        raise ConfigError(f"Unknown plan {name!r}. This server holds: {known}.")


# --- reading plans -----------------------------------------------------------------------------

_TERM = re.compile(r"(?:([1-9]\d*)x)?TP(\d+)(?:-(prefill|decode))?", re.IGNORECASE)
_EXPRESS_TIERS = ("priority", "default")
_BULK_TIERS = ("default", "flex", "batch")


def parse_plan(text: str, num_ranks: int) -> Plan:
    """A plan from shorthand: `4xTP1`, `TP2+2xTP1`, or layers over the same ranks, `TP2/4xTP1`.

    Terms fill the ranks from 0 on; each `/` starts again at rank 0. Where degrees differ, the
    widest lanes prefer priority and default requests, the others all but priority. A term may name
    a role, `TP2-prefill+2xTP1-decode`; lanes of such a plan prefer no tier.
    """
    lanes = [lane for layer in text.split("/") for lane in _parse_layer(layer, text)]
    widest = max(lane.degree for lane in lanes)
    uniform = all(lane.degree == widest for lane in lanes)
    if not uniform and all(lane.role == "mixed" for lane in lanes):
        lanes = [
            Lane(lane.group, "mixed", _EXPRESS_TIERS if lane.degree == widest else _BULK_TIERS)
            for lane in lanes
        ]
    return check_plan(Plan(text, tuple(lanes)), num_ranks)


def _parse_layer(layer: str, text: str) -> list[Lane]:
    lanes: list[Lane] = []
    next_rank = 0
    for term in layer.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None or not is_power_of_two(int(match[2])):
            raise ConfigError(
                f"Plan {text!r}: cannot read {term.strip()!r}. Write terms like TP2, 4xTP1 or "
                "TP2-prefill (degrees are powers of two), joined by +."
            )
        degree = int(match[2])
        if next_rank % degree:
            raise ConfigError(
                f"Plan {text!r}: TP{degree} would start at rank {next_rank}, which is not a "
                f"multiple of {degree}. Put wider lanes first."
            )
        for _ in range(int(match[1] or 1)):
            lanes.append(Lane(Group(degree, next_rank // degree), _role_of(match[3])))
            next_rank += degree
    return lanes


def _role_of(word: str | None) -> Role:
    match (word or "mixed").lower():
        case "prefill":
            return "prefill"
        case "decode":
            return "decode"
        case _:
            return "mixed"


def check_plan(plan: Plan, num_ranks: int) -> Plan:
    """The plan itself, or a `ConfigError` that says which rule it breaks."""
    covered = {rank for lane in plan.lanes for rank in lane.ranks}
    if covered - set(range(num_ranks)):
        raise ConfigError(f"Plan {plan.name!r} uses rank {max(covered)}; there are {num_ranks}.")
    if set(range(num_ranks)) - covered:
        idle = min(set(range(num_ranks)) - covered)
        raise ConfigError(f"Plan {plan.name!r} leaves rank {idle} without a lane.")
    if len(set(plan.groups)) != len(plan.groups):
        raise ConfigError(f"Plan {plan.name!r} names the same ranks twice.")
    _check_roles(plan)
    return plan


def _check_roles(plan: Plan) -> None:
    roles = {lane.role for lane in plan.lanes}
    unknown = roles - set(get_args(Role))
    if unknown:
        raise ConfigError(f"Plan {plan.name!r}: unknown role {unknown.pop()!r}.")
    if "mixed" not in roles and roles != {"prefill", "decode"}:
        raise ConfigError(
            f"Plan {plan.name!r} has only {roles.pop()} lanes; no request can finish."
        )
    if "decode" in roles and "prefill" not in roles:
        raise ConfigError(
            f"Plan {plan.name!r} has decode lanes and no prefill lane that would hand requests "
            "over to them."
        )


def default_plans(num_ranks: int) -> PlanSet:
    """The plans served when none are given: every uniform one, a mixed one, an overlay."""
    if not is_power_of_two(num_ranks):
        raise ConfigError(f"The number of ranks must be a power of two, not {num_ranks}.")
    names = [_uniform(num_ranks, degree) for degree in _degrees(num_ranks)]
    if num_ranks >= 4:
        half = num_ranks // 2
        names.append(f"TP{half}+{_uniform(half, 1)}")
        names.append(f"TP{half}/{_uniform(half, 1)}+TP{half}")
    if num_ranks >= 8:
        names.append(f"TP{num_ranks // 2}+2xTP{num_ranks // 4}")
    if num_ranks == 2:
        names.append("TP2/2xTP1")
    plans = tuple(parse_plan(name, num_ranks) for name in names)
    return PlanSet(num_ranks, plans, plans[0].name)


def _degrees(num_ranks: int) -> list[int]:
    return [1 << bit for bit in range(num_ranks.bit_length())]


def _uniform(num_ranks: int, degree: int) -> str:
    count = num_ranks // degree
    return f"TP{degree}" if count == 1 else f"{count}xTP{degree}"


def read_plans(entries: list[object], num_ranks: int, initial: str | None = None) -> PlanSet:
    """Plans from parsed YAML or JSON: shorthand strings, or mappings with `name` and `lanes`.

    A lane is `{ranks: [0, 1], role: mixed, tiers: [priority]}`; `role` and `tiers` may be left out.
    """
    plans = tuple(
        parse_plan(entry, num_ranks) if isinstance(entry, str) else _read_plan(entry, num_ranks)
        for entry in entries
    )
    if not plans:
        raise ConfigError("The plan file holds no plans.")
    if len({plan.name for plan in plans}) != len(plans):
        raise ConfigError("Plan names must be unique.")
    plan_set = PlanSet(num_ranks, plans, initial or plans[0].name)
    _ = plan_set[plan_set.initial]
    return plan_set


class _LaneEntry(msgspec.Struct, forbid_unknown_fields=True):
    ranks: list[int]
    role: Role = "mixed"
    tiers: tuple[str, ...] = ()


class _PlanEntry(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    lanes: list[_LaneEntry]


def _read_plan(entry: object, num_ranks: int) -> Plan:
    try:
        read = msgspec.convert(entry, _PlanEntry)
    except msgspec.ValidationError as error:
        raise ConfigError(f"Plan file: {error}.") from error
    lanes = tuple(
        Lane(_group_of(lane.ranks, read.name), lane.role, lane.tiers) for lane in read.lanes
    )
    return check_plan(Plan(read.name, lanes), num_ranks)


def _group_of(ranks: list[int], plan_name: str) -> Group:
    degree = len(ranks)
    if is_power_of_two(degree) and ranks[0] % degree == 0:
        group = Group(degree, ranks[0] // degree)
        if ranks == list(group.ranks):
            return group
    raise ConfigError(
        f"Plan {plan_name!r}: ranks {ranks} are not an aligned group. A lane takes 2^k "
        "neighbouring ranks starting at a multiple of 2^k, in order."
    )
