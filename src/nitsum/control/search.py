"""Which plans there are, which few of them to hold ready, and which nodes run which.

The layouts of up to eight ranks are few dozens, so they are all looked at. Choosing `num_plans` of
them is a facility location problem: every situation is served by the best plan that is open. It is
solved exactly: by enumeration after dropping dominated plans, by HiGHS where sets are too many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import combinations
from math import comb

from nitsum.control.classes import LaneClass, Shape
from nitsum.control.load import Load
from nitsum.control.score import PlanScore, Scorer
from nitsum.plan import Group, Lane, Plan, parse_plan

MAX_ENUMERATED = 200_000
LEAST_GAIN = 0.002
"""Of all value: a plan that adds less is not worth its memory."""
URGENT, PATIENT = ("priority", "default"), ("flex", "batch")


# --- which plans there are ------------------------------------------------------------------------


def feasible_plans(num_ranks: int, degrees: Sequence[int]) -> list[Plan]:
    """Every layout of lanes at `degrees`: partitions, halves by tier, express lanes over bulk ones.

    Mixed partitions come twice: wide lanes preferred by urgent tiers, and open to all. Partitions
    in two come with the roles prefill and decode, too.
    """
    plans: dict[tuple[Lane, ...], Plan] = {}
    for plan in _all_plans(num_ranks, sorted(degrees, reverse=True)):
        plans.setdefault(plan.lanes, plan)
    return list(plans.values())


def _all_plans(num_ranks: int, degrees: list[int]) -> Iterator[Plan]:
    for parts in _partitions(num_ranks, degrees):
        plan = parse_plan(_name(parts), num_ranks)
        yield plan
        if len(set(parts)) > 1:
            lanes = tuple(Lane(lane.group) for lane in plan.lanes)
            yield Plan(f"{plan.name} open", lanes)
        elif len(parts) > 1:
            yield _halves(plan)
        yield from _with_roles(parts, num_ranks)
    for wide in degrees:
        for narrow in degrees:
            if narrow < wide:
                yield from _overlays(num_ranks, wide, narrow)


def _partitions(total: int, degrees: list[int]) -> Iterator[list[int]]:
    """Degrees that add up to `total`, widest first."""
    if total == 0:
        yield []
    for place, degree in enumerate(degrees):
        if degree <= total:
            for rest in _partitions(total - degree, degrees[place:]):
                yield [degree, *rest]


def _name(parts: list[int]) -> str:
    counts = Counter(parts)
    return "+".join(_term(n, d) for d, n in counts.items())


def _halves(plan: Plan) -> Plan:
    """Equal lanes, one half for the urgent tiers, the other for the patient ones."""
    half = len(plan.lanes) // 2
    lanes = [Lane(lane.group, "mixed", URGENT) for lane in plan.lanes[:half]]
    lanes += [Lane(lane.group, "mixed", PATIENT) for lane in plan.lanes[half:]]
    return Plan(f"{plan.name} split", tuple(lanes))


def _with_roles(parts: list[int], num_ranks: int) -> Iterator[Plan]:
    """The partition with its first lanes for prompts and the others for answers. Cut where the
    degree changes, or in a half and a quarter of equal lanes; wide lanes may do either."""
    counts = Counter(parts)
    if len(counts) == 2:
        (wide, num_wide), (narrow, num_narrow) = counts.items()
        for first, second in (("prefill", "decode"), ("decode", "prefill")):
            yield parse_plan(
                f"{_term(num_wide, wide)}-{first}+{_term(num_narrow, narrow)}-{second}", num_ranks
            )
    elif len(counts) == 1 and len(parts) > 1:
        degree, num = parts[0], len(parts)
        for num_first in sorted({num // 2, num // 4, num - num // 4} - {0, num}):
            first, second = _term(num_first, degree), _term(num - num_first, degree)
            yield parse_plan(f"{first}-prefill+{second}-decode", num_ranks)


def _term(count: int, degree: int) -> str:
    return f"{count}xTP{degree}" if count > 1 else f"TP{degree}"


def _overlays(num_ranks: int, wide: int, narrow: int) -> Iterator[Plan]:
    """Express lanes of `wide` over the first ranks, or over all, and bulk lanes below."""
    bulk = _name([narrow] * (num_ranks // narrow))
    for num_wide in sorted({1, num_ranks // wide}):
        yield parse_plan(f"{_name([wide] * num_wide)}/{bulk}", num_ranks)


# --- which few to hold ready ----------------------------------------------------------------------


def best_set(values: Sequence[Sequence[float]], num_plans: int) -> list[int]:
    """At most `num_plans` rows of `values` (plan x situation) whose best adds up to most.

    Exact, each plan being charged `LEAST_GAIN` of the best single plan's sum; only without HiGHS,
    and with more sets than can be looked at, it is greedy.
    """
    rows = _undominated(values)
    num_plans = min(num_plans, len(rows))
    if sum(comb(len(rows), size) for size in range(1, num_plans + 1)) <= MAX_ENUMERATED:
        return best_set_by_enumeration(values, num_plans)
    if find_spec("highspy") is not None:
        from nitsum.control.highs import best_set_by_highs

        return best_set_by_highs(values, rows, num_plans, charge_of(values))
    return _greedy(values, rows, num_plans)


def charge_of(values: Sequence[Sequence[float]]) -> float:
    """What opening a plan costs, in the unit of `values`."""
    return LEAST_GAIN * max(map(sum, values))


def best_set_by_enumeration(values: Sequence[Sequence[float]], num_plans: int) -> list[int]:
    """`best_set` by looking at every set."""
    rows, charge = _undominated(values), charge_of(values)
    best: tuple[float, list[int]] = (float("-inf"), [])
    for size in range(1, min(num_plans, len(rows)) + 1):
        for chosen in combinations(rows, size):
            total = sum(map(max, zip(*(values[row] for row in chosen), strict=True)))
            if total - charge * size > best[0]:
                best = total - charge * size, list(chosen)
    return best[1]


def _undominated(values: Sequence[Sequence[float]]) -> list[int]:
    """Rows that no other row equals or beats everywhere; of equal ones the first."""
    kept: list[int] = []
    for i, row in enumerate(values):
        beaten = any(
            all(a >= b for a, b in zip(other, row, strict=True))
            and (j < i or any(a > b for a, b in zip(other, row, strict=True)))
            for j, other in enumerate(values)
            if j != i
        )
        if not beaten:
            kept.append(i)
    return kept


def _greedy(values: Sequence[Sequence[float]], rows: list[int], num_plans: int) -> list[int]:
    """For more plans than can be enumerated: at least 63% of the best sum."""
    chosen: list[int] = []
    reached = [0.0] * len(values[0])
    for _ in range(num_plans):
        row = max(rows, key=lambda r: sum(map(max, zip(values[r], reached, strict=True))))
        chosen.append(row)
        reached = list(map(max, zip(values[row], reached, strict=True)))
    return sorted(set(chosen))


# --- which nodes run which ------------------------------------------------------------------------


class Fleet:
    """Equal nodes that each run one plan; together they are scored as one machine.

    Lanes of a kind are pooled over all nodes, so a score costs as much as that of one node.
    Starting from the best single plan, blocks of nodes (half of them, a quarter, an eighth) change
    plan while that helps.
    """

    def __init__(self, scorer: Scorer, plans: Sequence[Plan], num_nodes: int) -> None:
        self.scorer = scorer
        self.num_nodes = num_nodes
        self.shapes = {plan.name: Shape.of(plan) for plan in plans}

    def score(self, counts: dict[str, int], load: Load) -> PlanScore:
        """Of `counts[plan]` nodes each."""
        return self.scorer.score(self._pooled(counts), load)

    def choose(self, load: Load) -> tuple[dict[str, int], PlanScore]:
        """How many nodes should run each plan."""
        alone = {name: self.score({name: self.num_nodes}, load) for name in self.shapes}
        ranked = sorted(alone, key=lambda name: -alone[name].value)
        counts, best = {ranked[0]: self.num_nodes}, alone[ranked[0]]
        if best.utilisation < 0.5:
            return counts, best
        block = self.num_nodes // 2
        while block:
            for name in ranked[:3]:
                moved = self._moved(counts, name, block)
                score = self.score(moved, load) if moved else best
                if score.value > best.value * 1.001:
                    counts, best = moved, score
            block = block // 2 if block > self.num_nodes // 8 else 0
        return counts, best

    def _moved(self, counts: dict[str, int], target: str, block: int) -> dict[str, int]:
        """`block` nodes of the most frequent other plan now run `target`; empty: not possible."""
        others = [name for name in counts if name != target and counts[name] >= block]
        if not others:
            return {}
        source = max(others, key=lambda name: counts[name])
        moved = {**counts, source: counts[source] - block, target: counts.get(target, 0) + block}
        return {name: count for name, count in moved.items() if count}

    def _pooled(self, counts: dict[str, int]) -> Shape:
        if len(counts) == 1:
            (name, count), *_ = counts.items()
            shape = self.shapes[name]
            return Shape(name, tuple(_times(c, count) for c in shape.classes), shape.cover)
        classes: list[LaneClass] = []
        blocks: list[tuple[tuple[float, ...], ...]] = []
        for name, count in counts.items():
            shape = self.shapes[name]
            classes += [_times(lane, count) for lane in shape.classes]
            blocks.append(shape.cover)
        name = " + ".join(f"{count} x [{name}]" for name, count in counts.items())
        return Shape(name, tuple(classes), _block_diagonal(blocks))


def _times(lane: LaneClass, count: int) -> LaneClass:
    return lane._replace(num_lanes=lane.num_lanes * count)


def _block_diagonal(
    blocks: Sequence[tuple[tuple[float, ...], ...]],
) -> tuple[tuple[float, ...], ...]:
    width = sum(len(block) for block in blocks)
    rows: list[tuple[float, ...]] = []
    before = 0
    for block in blocks:
        after = width - before - len(block)
        rows += [(0.0,) * before + row + (0.0,) * after for row in block]
        before += len(block)
    return tuple(rows)


def fleet_plan(counts: dict[str, int], plans: Sequence[Plan], node_ranks: int) -> Plan:
    """The counts as one plan over all nodes' ranks."""
    by_name = {plan.name: plan for plan in plans}
    lanes: list[Lane] = []
    node = 0
    for name, count in counts.items():
        for _ in range(count):
            for lane in by_name[name].lanes:
                index = lane.group.index + node * node_ranks // lane.degree
                lanes.append(Lane(Group(lane.degree, index), lane.role, lane.tiers))
            node += 1
    return Plan(" + ".join(f"{n} x [{name}]" for name, n in counts.items()), tuple(lanes))
