"""What the policies differ in. All run through the same code."""

from __future__ import annotations

from dataclasses import dataclass

from nitsum.config import Policy


@dataclass(frozen=True)
class Rules:
    """Which of the scheduler's means a policy uses."""

    tiers: bool = True
    """Higher tiers go first; otherwise first come, first served."""
    slack: bool = True
    """Order by slack inside a tier, relegate what is lost, size prefill chunks by slack; otherwise
    by arrival and as large as a step may be."""
    displaces: bool = True
    """A waiting request of a higher tier takes the slot of a running lower one."""
    keeps_kv: bool = True
    """KV that must make room goes to host memory, where there is any; otherwise it is dropped."""
    fair: bool = True
    """Tenants of a tier take turns by the service they had."""
    shares: bool = True
    """Guaranteed shares and bounded waits."""
    admits: bool = True
    """Promises, downgrades and refusals by capacity; otherwise only queues are bounded."""


RULES: dict[Policy, Rules] = {
    "nitsum": Rules(),
    "priority": Rules(
        slack=False, displaces=False, keeps_kv=False, fair=False, shares=False, admits=False
    ),
    "fcfs": Rules(
        tiers=False,
        slack=False,
        displaces=False,
        keeps_kv=False,
        fair=False,
        shares=False,
        admits=False,
    ),
}
