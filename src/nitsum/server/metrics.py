"""What `/metrics` shows, from engine outputs and status snapshots. One registry a server.

`vllm:*` metrics have the names and units of vLLM's, so that dashboards, autoscalers and routers
made for it work; `nitsum:*` are those only this server has.
"""

from __future__ import annotations

import re
from collections import deque
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from nitsum.errors import ApiError
from nitsum.messages import Output, Status, SwitchReport
from nitsum.request import Request
from nitsum.server import logs
from nitsum.server.caller import now_s
from nitsum.server.engine_counters import EngineCounters
from nitsum.server.scores import Scores
from nitsum.server.token_counters import TokenCounters
from nitsum.server.tracing import Tracing
from nitsum.tier import Tier, TierSet

# Fine around the targets of interactive tiers (50 ms a token, 200-300 ms to the first).
_TOKEN_BUCKETS_S = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075),
    *(0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
)
_FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.3),
    *(0.35, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_REQUEST_BUCKETS_S = (
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0),
)
_COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
_MAX_REASONS = 32
_MAX_OPS = 1024


class Metrics:
    """All series of one server."""

    def __init__(self, model_name: str, tiers: TierSet) -> None:
        self.registry = CollectorRegistry()
        self.tiers = tiers
        self.open: set[Watch] = set()
        """Engine requests that have not ended."""
        self.tracing: Tracing | None = None
        """Told of every request and switch that ends."""
        self._admin_ops: deque[str] = deque(maxlen=_MAX_OPS)
        self._ended_ops: deque[str] = deque(maxlen=_MAX_OPS)
        self._reasons: set[str] = set()
        self.vllm = VllmMetrics(self.registry, model_name)
        self.ours = NitsumMetrics(self.registry)
        self.engine = EngineCounters(self.registry)
        self.scores = Scores()

    def watch(self, request: Request) -> Watch:
        """Follows one engine request; use it as a context manager."""
        return Watch(self, request)

    def oldest_open_s(self) -> float:
        """For how long the oldest open request has been here, seconds; 0 without one."""
        arrivals = [watch.request.arrival_s for watch in self.open]
        return now_s() - min(arrivals) if arrivals else 0.0

    def asked_switch(self, op_id: str) -> None:
        """Remember that this switch was asked for over HTTP, and not by the controller."""
        self._admin_ops.append(op_id)

    def saw_switch(self, report: SwitchReport) -> None:
        """Count a switch that ended; once, however often its report is asked for."""
        if report.op_id in self._ended_ops:
            return
        self._ended_ops.append(report.op_id)
        if self.tracing is not None:
            self.tracing.switched(report)
        plans = (report.from_plan, report.to_plan)
        if not report.ok:
            self.ours.switches_failed.labels(*plans).inc()
            return
        reason = "admin" if report.op_id in self._admin_ops else "controller"
        self.ours.switches.labels(*plans, reason).inc()
        self.ours.switch_s.observe(report.duration_s)
        self.ours.migrated_bytes.inc(sum(wave.bytes_moved for wave in report.waves))

    def saw_status(self, status: Status) -> None:
        """Set the gauges that a snapshot of the engine tells."""
        self.engine.tally = status.tally
        self.vllm.running.set(status.num_running)
        self.vllm.waiting.set(status.num_waiting)
        self.vllm.kv_usage.set(max(status.kv_used, default=0.0))
        for rank, used in enumerate(status.kv_used):
            self.ours.kv_used.labels(str(rank)).set(used)
        for plan in status.plans:
            self.ours.plan_active.labels(plan).set(plan == status.plan)

    def render(self, accept: str, status: Status | None) -> tuple[bytes, str]:
        """The text for a scraper that accepts `accept`, and its content type.

        Without a status (no engine answers) the engine's gauges keep what was last known.
        """
        self.ours.engine_up.set(status is not None)
        if status is not None:
            self.saw_status(status)
        for tier in self.tiers.names():
            waiting = sum(w.first_s is None and w.tier == tier for w in self.open)
            self.ours.queue_depth.labels(tier).set(waiting)
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type

    def capped_reason(self, reason: str) -> str:
        """The reason without its numbers; only so many are told apart."""
        reason = re.sub(r"\d+(\.\d+)?", "#", reason)
        if reason not in self._reasons and len(self._reasons) >= _MAX_REASONS:
            return "other"
        self._reasons.add(reason)
        return reason


class VllmMetrics:
    """Series that vLLM has too, with its label."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def counter(name: str, text: str) -> Counter:
            made = Counter(f"vllm:{name}", text, ["model_name"], registry=registry)
            return made.labels(model_name)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, ["model_name"], registry=registry).labels(model_name)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=registry
            )
            return made.labels(model_name)

        self.running = gauge("num_requests_running", "Requests that are stepped.")
        self.waiting = gauge("num_requests_waiting", "Requests in queues.")
        self.kv_usage = gauge("kv_cache_usage_perc", "KV arena in use on the fullest rank, 0..1.")
        self.cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up.")
        self.cache_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests begun.")
        self.displaced = counter("num_preemptions", "Times a running request was displaced.")
        self.ttft_s = histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN_BUCKETS_S
        )
        self.tokens = TokenCounters(registry, model_name, _TOKEN_BUCKETS_S)
        self.tpot_s = histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token after the first, of an answer.",
            _TOKEN_BUCKETS_S,
        )
        self.e2e_s = histogram(
            "e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_BUCKETS_S
        )
        self.queue_s = histogram(
            "request_queue_time_seconds", "Arrival to first step.", _FIRST_TOKEN_BUCKETS_S
        )
        self.prefill_s = histogram(
            "request_prefill_time_seconds", "First step to first token.", _FIRST_TOKEN_BUCKETS_S
        )
        self.decode_s = histogram(
            "request_decode_time_seconds", "First token to last.", _REQUEST_BUCKETS_S
        )
        self.inference_s = histogram(
            "request_inference_time_seconds", "First step to last token.", _REQUEST_BUCKETS_S
        )
        self.request_prompt = histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", _COUNT_BUCKETS
        )
        self.request_output = histogram(
            "request_generation_tokens", "Tokens of an answer.", _COUNT_BUCKETS
        )
        self._success = Counter(
            "vllm:request_success",
            "Answers that ended as they should.",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        self._model_name = model_name

    def success(self, reason: str) -> None:
        self._success.labels(self._model_name, reason).inc()


class NitsumMetrics:
    """Series that only this server has."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"nitsum:{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"nitsum:{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"nitsum:{name}", text, labels, buckets=buckets, registry=registry)

        first, token = _FIRST_TOKEN_BUCKETS_S, _TOKEN_BUCKETS_S
        self.requests = counter(
            "requests",
            "Requests ended; outcome is ok, aborted or an error code.",
            *("tier_requested", "tier_served", "outcome"),
        )
        self.engine_up = gauge("engine_up", "1 when the engine answers.")
        self.queue_depth = gauge("queue_depth", "Requests without a first output.", "tier")
        self.queue_s = histogram("queue_wait_seconds", "Arrival to first step.", first, "tier")
        self.ttft_s = histogram("ttft_seconds", "Arrival to first token.", first, "tier")
        self.tpot_s = histogram("tpot_seconds", "Mean time per later token.", token, "tier")
        self.attained = counter("slo_attained", "Answers that met all targets of the tier.", "tier")
        self.missed = counter("slo_missed", "Answers that missed one.", "tier")
        self.goodput = counter("goodput_tokens", "Tokens of answers that met them all.", "tier")
        self.downgrades = counter("downgrades", "Requests served as a lower tier.", "reason")
        self.late = counter("late_requests", "Taken without a promise, to be hardly late.", "tier")
        self.kv_used = gauge("kv_used_ratio", "KV arena in use by requests, 0..1.", "rank")
        self.plan_active = gauge("plan_active", "1 for the plan that is served.", "plan")
        self.switches = counter("plan_switches", "Switches done.", "from", "to", "reason")
        self.switches_failed = counter("plan_switches_failed", "Switches refused.", "from", "to")
        self.switch_s = histogram("plan_switch_seconds", "Start to end of a switch.", first)
        self.migrated_bytes = counter("kv_migrated_bytes", "KV bytes moved by switches.")


class Watch:
    """Times of one engine request; what they mean is counted when it ends."""

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self.request = request
        self.first_s: float | None = None
        self.ended = False
        """The answer came to its end."""
        self.met: bool | None = None
        """Whether it met its tier's targets; None before its end."""
        self.num_displaced = 0
        self.num_tokens = 0
        """Of the answer, so far."""
        self.outcome = "aborted"
        """`ok`, `aborted` or an error code."""
        self.queue_s: float | None = None
        """Arrival to first step; None before the engine has said."""
        self.plan = self.lane = ""
        """Where it runs, as last told."""
        self._metrics = metrics
        self._last_s = 0.0
        self.tier = request.tier
        """The tier it is served as."""
        self._begun = False

    def __enter__(self) -> Watch:
        self._metrics.open.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._metrics.open.discard(self)
        labels = (self.request.tier_asked, self.tier, self.outcome)
        self._metrics.ours.requests.labels(*labels).inc()
        self._note()
        if self._metrics.tracing is not None:
            self._metrics.tracing.ended(self)

    def _note(self) -> None:
        """What the log's line about this request says of it."""
        logs.note(
            tier=self.tier,
            outcome=self.outcome,
            tenant=self.request.tenant or None,
            plan=self.plan,
            lane=self.lane,
            queue_ms=None if self.queue_s is None else round(self.queue_s * 1000, 1),
            ttft_ms=None if self.ttft_s is None else round(self.ttft_s * 1000, 1),
            num_prompt=len(self.request.prompt),
            num_output=self.num_tokens,
        )

    def failed(self, error: ApiError) -> None:
        """The engine refused or dropped it."""
        self.outcome = error.code or "error"

    def saw(self, output: Output, num_tokens: int, *, ended: bool) -> None:
        """Count an output; `num_tokens` of its tokens belong to the answer."""
        if not self._begun:
            self._begin(output)
        self.tier, self.plan, self.lane = output.tier, output.plan, output.lane
        if output.num_displaced > self.num_displaced:
            self._metrics.vllm.displaced.inc(output.num_displaced - self.num_displaced)
            self.num_displaced = output.num_displaced
        if num_tokens:
            self._saw_tokens(num_tokens)
        if ended:
            self._end(output)

    def _begin(self, output: Output) -> None:
        self._begun = True
        self.queue_s = output.queue_s
        vllm, ours = self._metrics.vllm, self._metrics.ours
        num_prompt = len(self.request.prompt)
        vllm.prompt_tokens.inc(num_prompt)
        vllm.cache_queries.inc(num_prompt)
        vllm.cache_hits.inc(output.num_cached)
        vllm.queue_s.observe(output.queue_s)
        ours.queue_s.labels(output.tier).observe(output.queue_s)
        if output.tier != self.request.tier_asked:
            reason = self._metrics.capped_reason(output.reason or _ceiling(self.request))
            ours.downgrades.labels(reason).inc()
        if output.late:
            ours.late.labels(output.tier).inc()

    def _saw_tokens(self, num_tokens: int) -> None:
        now = now_s()
        vllm = self._metrics.vllm
        vllm.tokens.num_tokens += num_tokens
        self.num_tokens += num_tokens
        if self.first_s is None:
            self.first_s = now
            vllm.ttft_s.observe(now - self.request.arrival_s)
            self._metrics.ours.ttft_s.labels(self.tier).observe(now - self.request.arrival_s)
        else:
            vllm.tokens.saw_gap(now - self._last_s)
        self._last_s = now

    def _end(self, output: Output) -> None:
        self.outcome = "ok"
        self.ended = True
        vllm, ours = self._metrics.vllm, self._metrics.ours
        vllm.success("length" if output.finish_reason == "length" else "stop")
        vllm.e2e_s.observe(now_s() - self.request.arrival_s)
        vllm.request_prompt.observe(len(self.request.prompt))
        vllm.request_output.observe(self.num_tokens)
        self._observe_phases()
        tpot_s = self.tpot_s
        if tpot_s is not None:
            vllm.tpot_s.observe(tpot_s)
            ours.tpot_s.labels(self.tier).observe(tpot_s)
        met = self.met = self._met_targets(self._metrics.tiers[self.tier], tpot_s)
        (ours.attained if met else ours.missed).labels(self.tier).inc()
        self._metrics.scores.add(self.tier, met=met, ttft_s=self.ttft_s, tpot_s=tpot_s)
        if met:
            ours.goodput.labels(self.tier).inc(self.num_tokens)

    def _observe_phases(self) -> None:
        if self.first_s is None or self.queue_s is None:
            return
        vllm = self._metrics.vllm
        begun_s = min(self.request.arrival_s + self.queue_s, self.first_s)
        vllm.prefill_s.observe(self.first_s - begun_s)
        vllm.decode_s.observe(self._last_s - self.first_s)
        vllm.inference_s.observe(self._last_s - begun_s)

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_s is None else self.first_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None before the second."""
        if self.first_s is None or self.num_tokens < 2:
            return None
        return (self._last_s - self.first_s) / (self.num_tokens - 1)

    def _met_targets(self, tier: Tier, tpot_s: float | None) -> bool:
        now = now_s()
        since = self.request.arrival_s
        first_s = now if self.first_s is None else self.first_s
        pairs = (
            (first_s - since, tier.ttft_s),
            (tpot_s, tier.tpot_s),
            (now - since, tier.deadline_s),
        )
        return all(value is None or target is None or value <= target for value, target in pairs)


def _ceiling(request: Request) -> str:
    return "not given" if request.tier == request.tier_asked else "the key's ceiling"
