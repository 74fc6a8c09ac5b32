"""Series that change with every token: plain numbers until somebody asks for them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from nitsum.server.engine_counters import cumulative
from nitsum.snapshot import Buckets


class TokenCounters(Collector):
    """Tokens generated, and the times between those of an answer."""

    def __init__(
        self, registry: CollectorRegistry, model_name: str, bounds_s: Sequence[float]
    ) -> None:
        self.num_tokens = 0
        self._labels = (model_name,)
        self._gaps = Buckets(list(bounds_s), [0] * (len(bounds_s) + 1), 0.0)
        self._sum_s = 0.0
        registry.register(self)

    def saw_gap(self, seconds: float) -> None:
        """Between two tokens of an answer."""
        self._gaps.counts[bisect_left(self._gaps.bounds_s, seconds)] += 1
        self._sum_s += seconds

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "vllm:generation_tokens", "Tokens generated.", labels=("model_name",)
        )
        tokens.add_metric(self._labels, self.num_tokens)
        yield tokens
        gaps = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of an answer.",
            labels=("model_name",),
        )
        gaps.add_metric(self._labels, cumulative(self._gaps), self._sum_s)
        yield gaps
