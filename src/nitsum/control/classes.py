"""A plan as the score sees it: lanes that are alike are one class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nitsum.plan import Lane, Plan, Role


class LaneClass(NamedTuple):
    """Lanes of a plan that are alike."""

    degree: int
    num_lanes: int
    tiers: tuple[str, ...]
    role: Role

    def serves(self, tier: str) -> bool:
        return not self.tiers or tier in self.tiers


@dataclass(frozen=True)
class Shape:
    """A plan as the score sees it: classes, and which share of a class's ranks another covers."""

    name: str
    classes: tuple[LaneClass, ...]
    cover: tuple[tuple[float, ...], ...]
    """cover[a][b]: share of b's ranks that also belong to a lane of a; 1 for a == b."""

    @classmethod
    def of(cls, plan: Plan) -> Shape:
        by_class: dict[tuple[int, tuple[str, ...], Role], list[Lane]] = {}
        for lane in plan.lanes:
            by_class.setdefault((lane.degree, lane.tiers, lane.role), []).append(lane)
        ranks = [{r for lane in lanes for r in lane.ranks} for lanes in by_class.values()]
        cover = tuple(tuple(len(a & b) / len(b) for b in ranks) for a in ranks)
        classes = tuple(
            LaneClass(degree, len(lanes), tiers, role)
            for (degree, tiers, role), lanes in by_class.items()
        )
        return cls(plan.name, classes, cover)
