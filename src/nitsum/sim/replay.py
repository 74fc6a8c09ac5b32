"""A served run beside its simulation: the same arrivals again, and how far the two lie apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

from nitsum.cost.fit import StepPoint
from nitsum.cost.protocol import CostModel
from nitsum.errors import ConfigError
from nitsum.metrics.goodput import arrival_window, judged, met
from nitsum.metrics.percentiles import percentile
from nitsum.metrics.records import Recorder, RequestRecord
from nitsum.metrics.targets import Target, Targets, own_target
from nitsum.plan import Lane
from nitsum.step import BatchShape
from nitsum.workload.items import Segment, WorkItem

Twins = tuple[RequestRecord, RequestRecord]
"""A served request and its simulated twin."""


def items_of(run: Recorder) -> Iterator[WorkItem]:
    """The requests of a served run, at the times at which they arrived, from 0 on.

    Raises `ConfigError` when none was answered.

    An answer that was broken off is as long as it came. One that had not begun is as long as it
    could have been, but no longer than the longest of the run. Events do not say whose prefix a
    request shared: all that found something cached share one prefix here, so that as many tokens
    need no computing once it is warm.
    """
    records = sorted(run.requests.values(), key=_arrival)
    longest = max((record.num_output for record in records if record.is_answered), default=0)
    if not longest:
        raise ConfigError("No request of the served run was answered: nothing to compare with.")
    start_s = records[0].arrival_s
    for record in records:
        yield WorkItem(
            request_id=record.request_id,
            at_s=record.arrival_s - start_s,
            num_output=record.num_output or min(record.max_tokens, longest),
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
    """One figure, served and simulated: seconds, or requests per second."""

    name: str
    num_samples: int
    served: float
    simulated: float

    @property
    def error(self) -> float:
        """Of the simulated figure, as a share of the served one; of times, above 0 is too slow."""
        return self.simulated / self.served - 1.0 if self.served else 0.0

    @property
    def stem(self) -> str:
        """The name without its unit."""
        return self.name.removesuffix("_s").removesuffix("_per")


def compare(
    served: Recorder,
    simulated: Recorder,
    *,
    targets: Targets | None = None,
    warmup_s: float = 0.0,
) -> list[Pair]:
    """P50 and P99 of TTFT and TPOT over the requests that both answered, and goodput of all; then
    the same of each tier that was asked for, where there are several.

    Arrivals of the first `warmup_s` are left out. Without targets, both are judged by what the
    served requests were held to, and goodput is left out where that is nothing.
    """
    window = arrival_window(list(served.requests.values()), warmup_s)
    twins = [
        (record, twin)
        for record in judged(list(served.requests.values()), window)
        if (twin := simulated.requests.get(record.request_id)) is not None
    ]
    by_tier: dict[str, list[Twins]] = {}
    for pair in twins:
        by_tier.setdefault(f"{pair[0].tier_asked}_", []).append(pair)
    if len(by_tier) == 1:
        by_tier.clear()
    return [
        each._replace(name=f"{prefix}{each.name}")
        for prefix, some in [("", twins), *sorted(by_tier.items())]
        for each in (*_times(some), *_goodput(some, targets, window.length_s))
    ]


def _times(twins: Sequence[Twins]) -> Iterator[Pair]:
    both = [pair for pair in twins if all(record.is_answered for record in pair)]
    for name in ("ttft", "tpot"):
        for share in (0.5, 0.99):
            left = _sorted(getattr(record, f"{name}_s") for record, _ in both)
            right = _sorted(getattr(twin, f"{name}_s") for _, twin in both)
            if left and right:
                figures = percentile(left, share), percentile(right, share)
                yield Pair(f"{name}_p{share * 100:.0f}_s", len(left), *figures)


def _goodput(twins: Sequence[Twins], targets: Targets | None, length_s: float) -> Iterator[Pair]:
    """Judged alike: what the simulated twin was held to does not count."""
    held = own_target if targets is None else targets.of_record
    asked = [(record, twin, held(record)) for record, twin in twins]
    if length_s > 0 and any(target != Target() for _, _, target in asked):
        mine = sum(met(record, target) for record, _, target in asked)
        theirs = sum(met(twin, target) for _, twin, target in asked)
        yield Pair("goodput_per_s", len(twins), mine / length_s, theirs / length_s)


def _sorted(values: Iterable[float | None]) -> list[float]:
    return sorted(value for value in values if value is not None)


def pair_figures(pairs: Iterable[Pair]) -> dict[str, float]:
    """Flat figures for a result's `summary.json`; errors are shares."""
    found: dict[str, float] = {}
    for pair in pairs:
        found[f"served_{pair.name}"] = pair.served
        found[f"simulated_{pair.name}"] = pair.simulated
        found[f"sim_error_{pair.stem}"] = pair.error
    return found


# --- steps ---------------------------------------------------------------------------------------


class StepPair(NamedTuple):
    """Steps of one kind at one degree, as the engine saw them and as the cost model has them."""

    degree: int
    kind: str
    num_steps: int
    served_s: float
    predicted_s: float
    """Medians."""

    @property
    def error(self) -> float:
        return self.predicted_s / self.served_s - 1.0 if self.served_s else 0.0


def step_pairs(served: Recorder, cost: CostModel) -> list[StepPair]:
    """Where the error comes from, if the events are the engine's: clients see no steps."""
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for step in served.steps:
        if step.sent_s is not None:
            predicted_s = cost.step_time(Lane(step.group), step.shape)
            times = found.setdefault((step.group.degree, _kind(step.shape)), [])
            times.append((step.seconds, predicted_s))
    return [
        StepPair(degree, kind, len(times), *(median(column) for column in zip(*times, strict=True)))
        for (degree, kind), times in sorted(found.items())
    ]


def _kind(shape: BatchShape) -> str:
    if not shape.prefill_tokens:
        return "decode"
    return "mixed" if shape.num_decode else "prefill"


def step_points(served: Recorder) -> Iterator[StepPoint]:
    """The steps of an engine as measured points; steps a client cannot see are not there."""
    for step in served.steps:
        shape = step.shape
        if step.sent_s is not None and shape.num_tokens and step.seconds > 0.0:
            yield StepPoint(
                degree=step.group.degree,
                num_decode=shape.num_decode,
                decode_context_tokens=shape.decode_context_tokens,
                prefill_tokens=shape.prefill_tokens,
                prefill_context_tokens=shape.prefill_context_tokens,
                seconds=step.seconds,
            )
