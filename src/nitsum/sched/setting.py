"""What all lanes of one generation decide with."""

from __future__ import annotations

from dataclasses import dataclass, field

from nitsum.clock import Clock
from nitsum.cost.protocol import CostModel
from nitsum.kv.cache import KvCache
from nitsum.sched.estimate import Estimator
from nitsum.sched.fairness import Accounts
from nitsum.sched.limits import LaneLimits
from nitsum.sched.rules import Rules
from nitsum.sequence import Sequence
from nitsum.tier import TierSet


@dataclass(frozen=True)
class Setting:
    clock: Clock
    kv: KvCache
    tiers: TierSet
    limits: LaneLimits
    cost: CostModel
    estimator: Estimator
    rules: Rules
    accounts: dict[str, Accounts] = field(default_factory=dict[str, Accounts])
    """Service received, by tier and tenant; outlives generations."""
    levels: dict[str, int] = field(init=False)
    """Order of the tiers: 0 is served first. One level for all without tiers."""

    def __post_init__(self) -> None:
        names = self.tiers.names()
        levels = {name: index if self.rules.tiers else 0 for index, name in enumerate(names)}
        object.__setattr__(self, "levels", levels)
        for name in names:
            self.accounts.setdefault(name, Accounts()).forget_waiting()

    def now(self) -> float:
        return self.clock.now()

    @property
    def num_levels(self) -> int:
        return len(self.tiers.ordered) if self.rules.tiers else 1

    def level(self, sequence: Sequence) -> int:
        return self.levels[sequence.tier]

    def accounts_of(self, level: int) -> Accounts:
        return self.accounts[self.tiers.ordered[level].name]

    def shares(self) -> tuple[float, ...]:
        """Guaranteed share of each level."""
        if not self.rules.shares:
            return (0.0,) * self.num_levels
        return tuple(tier.min_share for tier in self.tiers.ordered)
