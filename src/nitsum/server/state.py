"""What a dashboard shows, as one value: the server's side of things and the engine's."""

from __future__ import annotations

import time

import msgspec

from nitsum import __version__
from nitsum.messages import LaneStatus, Status
from nitsum.server.caller import now_s
from nitsum.server.metrics import Metrics
from nitsum.server.service import Service
from nitsum.snapshot import Happening
from nitsum.tier import Tier


class LaneView(msgspec.Struct, frozen=True):
    """A lane: which ranks, which degree, how much it has to do."""

    name: str
    first_rank: int
    degree: int
    role: str
    tiers: tuple[str, ...]
    num_running: int
    num_paused: int
    num_waiting: int
    draining: bool


class RankView(msgspec.Struct, frozen=True):
    """A rank: share of the last seconds spent in steps, share of its KV arena in use."""

    rank: int
    busy: float
    kv_used: float


class TierView(msgspec.Struct, frozen=True):
    """A tier: its queue now, what ended in the last five minutes, its targets. Milliseconds."""

    name: str
    num_waiting: int
    """Without a first token."""
    num_running: int
    num_ended: int
    attained: float | None
    """Share of what ended that met all targets."""
    ttft_ms: float | None
    tpot_ms: float | None
    """Medians."""
    ttft_target_ms: float | None
    tpot_target_ms: float | None
    deadline_ms: float | None


class NewsView(msgspec.Struct, frozen=True):
    """Something that happened, `ago_s` seconds ago, `count` times in a row."""

    ago_s: float
    kind: str
    text: str
    count: int


class Sample(msgspec.Struct, frozen=True):
    """A point of the history; one a second."""

    time_s: float
    """Unix time."""
    plan: str
    switching_to: str | None
    lanes: list[tuple[int, int, int]]
    """(first rank, degree, running)"""
    busy: list[float]
    kv_used: list[float]
    num_waiting: int
    num_running: int
    tokens_per_s: float


class State(msgspec.Struct, frozen=True):
    """Everything; without an engine that answers, lanes and ranks are empty."""

    time_s: float
    uptime_s: float
    version: str
    model: str
    engine_up: bool
    plan: str
    plans: list[str]
    switching_to: str | None
    generation: int
    draining: bool
    lanes: list[LaneView]
    ranks: list[RankView]
    tiers: list[TierView]
    tokens_per_s: float
    num_open: int
    num_restarts: int
    last_restart_s: float
    news: list[NewsView]
    """The newest first."""
    decision: str
    """The controller's last one, in words; empty before the first, or without a controller."""
    history: list[Sample] = []


def state_of(service: Service, status: Status | None, tokens_per_s: float) -> State:
    """The state, from a status of the engine, or None when it does not answer."""
    tally = None if status is None else status.tally
    return State(
        time_s=time.time(),
        uptime_s=time.time() - service.created_s,
        version=__version__,
        model=service.model_name,
        engine_up=status is not None,
        plan="" if status is None else status.plan,
        plans=[] if status is None else status.plans,
        switching_to=None if status is None else status.switching_to,
        generation=0 if status is None else status.generation,
        draining=service.draining or (status is not None and status.draining),
        lanes=[] if status is None else [_lane(lane) for lane in status.lanes],
        ranks=[] if status is None else _ranks(status),
        tiers=[_tier(service.metrics, tier) for tier in service.tiers.ordered],
        tokens_per_s=tokens_per_s,
        num_open=len(service.metrics.open),
        num_restarts=0 if tally is None else tally.num_restarts,
        last_restart_s=0.0 if tally is None else tally.last_restart_s,
        news=[] if status is None else _news(status),
        decision="" if status is None or not status.decisions else status.decisions[-1].words,
    )


def sample_of(state: State) -> Sample:
    """What the history keeps of a state."""
    return Sample(
        time_s=round(state.time_s, 2),
        plan=state.plan,
        switching_to=state.switching_to,
        lanes=[(lane.first_rank, lane.degree, lane.num_running) for lane in state.lanes],
        busy=[round(rank.busy, 3) for rank in state.ranks],
        kv_used=[round(rank.kv_used, 3) for rank in state.ranks],
        num_waiting=sum(tier.num_waiting for tier in state.tiers),
        num_running=sum(tier.num_running for tier in state.tiers),
        tokens_per_s=round(state.tokens_per_s, 1),
    )


def _lane(lane: LaneStatus) -> LaneView:
    return LaneView(
        name=str(lane.group),
        first_rank=lane.group.ranks.start,
        degree=lane.group.degree,
        role=lane.role,
        tiers=lane.tiers,
        num_running=lane.num_running,
        num_paused=lane.num_paused,
        num_waiting=lane.num_waiting,
        draining=lane.draining,
    )


def _ranks(status: Status) -> list[RankView]:
    busy = status.tally.rank_busy_ratio if status.tally else [0.0] * len(status.kv_used)
    pairs = zip(busy, status.kv_used, strict=True)
    return [RankView(rank, share, kv_used) for rank, (share, kv_used) in enumerate(pairs)]


def _tier(metrics: Metrics, tier: Tier) -> TierView:
    here = [watch for watch in metrics.open if watch.tier == tier.name]
    num_waiting = sum(watch.first_s is None for watch in here)
    score = metrics.scores.of(tier.name)
    return TierView(
        name=tier.name,
        num_waiting=num_waiting,
        num_running=len(here) - num_waiting,
        num_ended=score.num_ended,
        attained=score.attained,
        ttft_ms=_ms(score.ttft_s),
        tpot_ms=_ms(score.tpot_s),
        ttft_target_ms=_ms(tier.ttft_s),
        tpot_target_ms=_ms(tier.tpot_s),
        deadline_ms=_ms(tier.deadline_s),
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def _news(status: Status) -> list[NewsView]:
    happenings: list[Happening] = [] if status.tally is None else status.tally.recent
    shift_s = status.now_s or now_s()
    return [
        NewsView(round(max(0.0, shift_s - one.at_s), 1), one.kind, one.text, one.count)
        for one in reversed(happenings)
    ]
