"""Who got what was promised: attainment and goodput, by tier; agent chains as wholes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from nitsum.metrics.records import RequestRecord
from nitsum.metrics.targets import Target

TargetOf = Callable[[RequestRecord], Target]


class Window(NamedTuple):
    """Requests that arrived in start..end are judged, whenever they finished."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s

    def holds(self, at_s: float) -> bool:
        return self.start_s <= at_s <= self.end_s


def arrival_window(
    records: Iterable[RequestRecord], warmup_s: float = 0.0, end_s: float | None = None
) -> Window:
    """From the first arrival plus the warm-up to the last arrival (or `end_s`)."""
    arrivals = [record.arrival_s for record in records]
    if not arrivals:
        return Window(0.0, 0.0)
    start_s = min(arrivals) + warmup_s
    return Window(start_s, max(start_s, max(arrivals) if end_s is None else end_s))


def met(record: RequestRecord, target: Target) -> bool:
    """Answered, and within every target that is named; one token alone meets any TPOT."""
    if not record.is_answered:
        return False
    pairs = (
        (record.ttft_s, target.ttft_s),
        (record.tpot_s, target.tpot_s),
        (record.e2e_s, target.deadline_s),
    )
    return all(value is None or limit is None or value <= limit for value, limit in pairs)


def judged(records: Iterable[RequestRecord], window: Window) -> list[RequestRecord]:
    """Arrivals of the window. Those the client broke off are nobody's success or failure."""
    return [r for r in records if window.holds(r.arrival_s) and r.outcome != "abort"]


def held(records: Iterable[RequestRecord], target_of: TargetOf) -> list[RequestRecord]:
    """Those of tiers that have targets. Of one that has none, all would be in time."""
    tiers = by_tier(records).values()
    return [record for tier in tiers if _has_targets(tier, target_of) for record in tier]


def _has_targets(tier: Iterable[RequestRecord], target_of: TargetOf) -> bool:
    """An engine refuses before it sets any: where it did nothing else, nobody knows."""
    accepted = [record for record in tier if record.outcome != "refused"]
    return not accepted or any(target_of(record) != Target() for record in accepted)


class Attainment(NamedTuple):
    num_requests: int
    num_held: int
    """Of tiers that have targets."""
    num_met: int
    window_s: float

    @property
    def share(self) -> float | None:
        return self.num_met / self.num_held if self.num_held else None

    @property
    def goodput_per_s(self) -> float | None:
        """None where no tier has targets."""
        is_known = self.num_held > 0 or not self.num_requests
        return self.num_met / self.window_s if is_known and self.window_s > 0 else None


def attainment(records: Sequence[RequestRecord], window: Window, target_of: TargetOf) -> Attainment:
    """How many of `records` (already judged) met their targets; refused ones did not."""
    those = held(records, target_of)
    num_met = sum(met(record, target_of(record)) for record in those)
    return Attainment(len(records), len(those), num_met, window.length_s)


def by_tier(records: Iterable[RequestRecord]) -> dict[str, list[RequestRecord]]:
    """By the tier that was asked for."""
    tiers: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        tiers[record.tier_asked].append(record)
    return dict(sorted(tiers.items()))


class ChainRecord(NamedTuple):
    """All calls of one agent chain that the run saw."""

    chain_id: str
    num_calls: int
    arrival_s: float
    latency_s: float | None
    """First arrival to last answer; None if a call was not answered."""
    met_deadline: bool | None
    """None: it had no deadline."""


def chains(records: Iterable[RequestRecord]) -> list[ChainRecord]:
    """Chains in order of their first arrival."""
    calls: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        if record.chain_id is not None:
            calls[record.chain_id].append(record)
    found = [_chain(chain_id, of_chain) for chain_id, of_chain in calls.items()]
    return sorted(found, key=lambda chain: chain.arrival_s)


def _chain(chain_id: str, calls: list[RequestRecord]) -> ChainRecord:
    first_s = min(call.arrival_s for call in calls)
    ends = [call.finished_s for call in calls if call.is_answered and call.finished_s is not None]
    complete = len(ends) == len(calls)
    deadlines = [c.chain_deadline_s for c in calls if c.chain_deadline_s is not None]
    met_deadline = complete and max(ends) <= min(deadlines) if deadlines else None
    latency_s = max(ends) - first_s if complete else None
    return ChainRecord(chain_id, len(calls), first_s, latency_s, met_deadline)
