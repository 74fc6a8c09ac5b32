"""Series whose values the engine counts; they begin anew when its process does, as counters may."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from nitsum.snapshot import Buckets, Tally


class EngineCounters(Collector):
    """Shows the tally of the engine's last status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.tally: Tally | None = None
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The series; none before the engine has answered once."""
        if self.tally is not None:
            yield from _by_tier(self.tally)
            yield from _by_rank(self.tally)
            yield from _of_workers(self.tally)
            yield from _of_plans(self.tally)


def _by_tier(tally: Tally) -> Iterator[Metric]:
    preemptions = CounterMetricFamily(
        "nitsum:preemptions",
        "Times a running request made room, by its tier and the other's.",
        labels=("victim", "by"),
    )
    for victim, by, count in tally.preemptions:
        preemptions.add_metric((victim, by), count)
    yield preemptions
    promotions = CounterMetricFamily(
        "nitsum:starvation_promotions",
        "Requests served ahead of their turn so that their wait stays bounded.",
        labels=("tier",),
    )
    for tier, count in tally.promotions:
        promotions.add_metric((tier,), count)
    yield promotions
    refusals = CounterMetricFamily(
        "nitsum:refusals", "Requests the engine turned away.", labels=("tier", "code")
    )
    for tier, code, count in tally.refusals:
        refusals.add_metric((tier, code), count)
    yield refusals


def _by_rank(tally: Tally) -> Iterator[Metric]:
    busy = GaugeMetricFamily(
        "nitsum:gpu_busy_ratio",
        "Share of the last 10 s that a rank (GPU or CPU process) spent in steps, 0..1.",
        labels=("rank",),
    )
    busy_s = CounterMetricFamily("nitsum:rank_busy_seconds", "Time in steps.", labels=("rank",))
    waiting_s = CounterMetricFamily(
        "nitsum:rank_waiting_seconds",
        "Of the time in steps, waiting for peers inside collectives, as far as ranks can tell.",
        labels=("rank",),
    )
    columns = zip(tally.rank_busy_ratio, tally.rank_busy_s, tally.rank_waiting_s, strict=True)
    for rank, (ratio, seconds, waiting) in enumerate(columns):
        busy.add_metric((str(rank),), ratio)
        busy_s.add_metric((str(rank),), seconds)
        waiting_s.add_metric((str(rank),), waiting)
    yield busy
    yield busy_s
    yield waiting_s
    memory = GaugeMetricFamily(
        "nitsum:memory_bytes", "What a rank's memory goes to.", labels=("rank", "use")
    )
    for rank, uses in enumerate(tally.memory_bytes):
        for use, size in uses.items():
            memory.add_metric((str(rank), use), size)
    yield memory


def _of_workers(tally: Tally) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "nitsum:worker_restarts",
        "Generations of workers begun after the first.",
        value=tally.num_restarts,
    )
    yield CounterMetricFamily(
        "nitsum:replayed_requests",
        "Requests that went on in new workers from prompt plus tokens so far.",
        value=tally.num_replayed,
    )
    yield GaugeMetricFamily(
        "nitsum:worker_restart_seconds",
        "How long the last restart took; 0 before the first.",
        value=tally.last_restart_s,
    )
    yield CounterMetricFamily(
        "nitsum:kv_evicted_blocks", "Cached blocks dropped.", value=tally.num_evicted_blocks
    )


def _of_plans(tally: Tally) -> Iterator[Metric]:
    memory = GaugeMetricFamily(
        "nitsum:plan_memory_bytes",
        "What a plan being resident costs: the buffers its lanes communicate through.",
        labels=("plan",),
    )
    for plan, size in tally.plan_memory_bytes.items():
        memory.add_metric((plan,), size)
    yield memory
    yield HistogramMetricFamily(
        "nitsum:plan_switch_gap_seconds",
        "Longest time without a token of each stream that a switch moved.",
        buckets=cumulative(tally.switch_gaps),
        sum_value=tally.switch_gaps.sum_s,
    )


def cumulative(gaps: Buckets) -> list[tuple[str, float]]:
    """A histogram as Prometheus has it: of each bound, how many values were at most that."""
    total = 0
    found: list[tuple[str, float]] = []
    for bound, count in zip([*map(str, gaps.bounds_s), "+Inf"], gaps.counts, strict=True):
        total += count
        found.append((bound, total))
    return found
