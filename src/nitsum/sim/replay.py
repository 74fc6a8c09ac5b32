"""A served run beside its simulation: the same arrivals again, and how far the two lie apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nitsum.metrics.percentiles import percentile
from nitsum.metrics.records import Recorder, RequestRecord
from nitsum.workload.items import Segment, WorkItem


def items_of(run: Recorder) -> Iterator[WorkItem]:
    """The answered requests of a served run, at the times at which they arrived, from 0 on.

    Events do not say whose prefix a request shared. All that found something cached share one
    prefix here, so that as many tokens need no computing once it is warm.
    """
    records = sorted((r for r in run.requests.values() if r.is_answered), key=_arrival)
    start_s = records[0].arrival_s if records else 0.0
    for record in records:
        yield WorkItem(
            request_id=record.request_id,
            at_s=record.arrival_s - start_s,
            num_output=record.num_output,
            tier=record.tier_asked,
            tenant=record.tenant,
            segments=_segments(record),
        )


def _arrival(record: RequestRecord) -> float:
    return record.arrival_s


def _segments(record: RequestRecord) -> tuple[Segment, ...]:
    own = Segment(record.request_id, record.num_prompt - record.num_cached)
    if not record.num_cached:
        return (own,)
    return (Segment("cached", record.num_cached, shared=True), own)


class Pair(NamedTuple):
    """One figure, served and simulated, seconds."""

    name: str
    num_samples: int
    served_s: float
    simulated_s: float

    @property
    def error(self) -> float:
        """Of the simulated figure, as a share of the served one; above 0 is too slow."""
        return self.simulated_s / self.served_s - 1.0 if self.served_s else 0.0


def compare(served: Recorder, simulated: Recorder) -> list[Pair]:
    """P50 and P99 of TTFT and TPOT over the requests that both answered."""
    both = [
        (record, twin)
        for record in served.requests.values()
        if (twin := simulated.requests.get(record.request_id)) is not None
        and record.is_answered
        and twin.is_answered
    ]
    pairs: list[Pair] = []
    for name in ("ttft", "tpot"):
        for share in (0.5, 0.99):
            left = _sorted(getattr(record, f"{name}_s") for record, _ in both)
            right = _sorted(getattr(twin, f"{name}_s") for _, twin in both)
            if left and right:
                figures = percentile(left, share), percentile(right, share)
                pairs.append(Pair(f"{name}_p{share * 100:.0f}_s", len(left), *figures))
    return pairs


def _sorted(values: Iterable[float | None]) -> list[float]:
    return sorted(value for value in values if value is not None)


def pair_figures(pairs: Iterable[Pair]) -> dict[str, float]:
    """Flat figures for a result's `summary.json`."""
    found: dict[str, float] = {}
    for pair in pairs:
        found[f"served_{pair.name}"] = pair.served_s
        found[f"sim_{pair.name}"] = pair.simulated_s
        found[f"sim_error_{pair.name.removesuffix('_s')}_share"] = pair.error
    return found
