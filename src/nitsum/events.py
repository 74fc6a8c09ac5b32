"""The one event stream. Every metric, live or simulated, is computed from these and nothing else.

`at_s` is the engine's clock. Events are plain facts, written in the order in which they happened.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from nitsum.plan import Group
from nitsum.request import FinishReason
from nitsum.step import RankTime


class Event(msgspec.Struct, frozen=True, tag=True):
    at_s: float


class Arrived(Event, frozen=True, kw_only=True):
    request_id: str
    tier_asked: str
    tier: str
    tenant: str
    num_prompt: int
    max_tokens: int
    arrival_s: float
    """When the server received it; `at_s` is when the engine did."""
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None
    deadline_s: float | None = None
    """Targets it is held to, relative to `arrival_s`."""
    chain_id: str | None = None
    chain_deadline_s: float | None = None
    """Absolute time by which the whole chain should be complete."""


class Routed(Event, frozen=True, kw_only=True):
    request_id: str
    group: Group
    promised: bool
    """False: best effort, outside what the lane can promise."""
    late: bool = False
    """It has no promise and was taken in its tier all the same: it will be hardly late."""


class Refused(Event, frozen=True, kw_only=True):
    request_id: str
    tier: str
    code: str


class Downgraded(Event, frozen=True, kw_only=True):
    request_id: str
    from_tier: str
    to_tier: str
    reason: str


class Started(Event, frozen=True, kw_only=True):
    """First step that contains the request was sent."""

    request_id: str
    group: Group
    step_id: int
    num_cached: int


class StepSent(Event, frozen=True, kw_only=True):
    step_id: int
    group: Group
    num_decode: int
    prefill_tokens: int
    context_tokens: int
    predicted_s: float | None = None


class StepEnded(Event, frozen=True, kw_only=True):
    """A step's result arrived; `tokens` maps requests to how many answer tokens became known."""

    step_id: int
    group: Group
    seconds: float
    tokens: list[tuple[str, int]]
    waited_s: float = 0.0
    """Of `seconds`, how long the lane's leader waited for its peers, as far as it can tell."""


class RankTimed(Event, frozen=True, kw_only=True):
    """What steps took a rank that does not lead their lane; they may not have ended yet."""

    rank: int
    steps: list[RankTime]


class Displaced(Event, frozen=True, kw_only=True):
    """A running request was paused, KV kept, in favour of another."""

    request_id: str
    tier: str
    by_request_id: str
    by_tier: str
    step_id: int


class Resumed(Event, frozen=True, kw_only=True):
    request_id: str
    step_id: int
    num_recomputed: int


class Preempted(Event, frozen=True, kw_only=True):
    """A request lost its room in device memory to another; see `Resumed` for what that cost."""

    request_id: str
    tier: str
    by_request_id: str
    by_tier: str
    step_id: int
    kept: bool
    """Its KV is in host memory; otherwise it will be computed again."""


class Promoted(Event, frozen=True, kw_only=True):
    """A request was served ahead of its turn so that its wait stays bounded."""

    request_id: str
    tier: str
    waited_s: float


class Finished(Event, frozen=True, kw_only=True):
    request_id: str
    tier: str
    reason: FinishReason
    num_output: int
    num_cached: int
    group: Group | None


class SwitchStarted(Event, frozen=True, kw_only=True):
    op_id: str
    from_plan: str
    to_plan: str
    reason: str


class WaveProposed(Event, frozen=True, kw_only=True):
    op_id: str
    wave: int
    request_ids: list[str]
    num_units: int


class WaveCommitted(Event, frozen=True, kw_only=True):
    op_id: str
    wave: int
    request_ids: list[str]
    bytes_moved: int


class WaveRolledBack(Event, frozen=True, kw_only=True):
    op_id: str
    wave: int
    request_ids: list[str]
    reason: str


class SwitchEnded(Event, frozen=True, kw_only=True):
    op_id: str
    from_plan: str
    to_plan: str
    ok: bool
    message: str
    duration_s: float
    bytes_moved: int
    num_left_behind: int
    longest_turn_s: float = 0.0
    """Of the engine, while the switch was under way."""


class HandedOver(Event, frozen=True, kw_only=True):
    """A request whose prompt a prefill lane computed goes on in another lane."""

    request_id: str
    from_group: Group
    to_group: Group
    bytes_moved: int
    duration_s: float
    """From the reservation to the last acknowledgement; its prompt may be computed meanwhile."""
    held_s: float
    """Of that, the time in which no step could contain it."""


class Evicted(Event, frozen=True, kw_only=True):
    """Cached blocks were dropped to make room."""

    group: Group
    num_blocks: int


class PlanScored(msgspec.Struct, frozen=True, kw_only=True):
    """One plan as a decision saw it."""

    plan: str
    value: float
    """Predicted requests per second that meet their targets, weighted by tier."""
    feasible_per_s: dict[str, float]
    """The same by tier, unweighted."""
    switch_cost: float = 0.0
    """Value per second lost by going there, spread over the expected dwell."""


class TierObserved(msgspec.Struct, frozen=True, kw_only=True):
    """The load of one tier that a decision was made for."""

    rate_per_s: float
    prompt_tokens: float
    output_tokens: float
    num_waiting: int


class PlanDecided(Event, frozen=True, kw_only=True):
    """The controller looked at every plan; `chosen` may be the one in force."""

    decision: int
    plan: str
    """In force when it was decided."""
    chosen: str
    reason: str
    trigger: str
    """window, burst or mix."""
    scores: list[PlanScored]
    """Of all plans, the best first."""
    load: dict[str, TierObserved]
    expected_dwell_s: float
    correction: dict[int, float] = {}
    """Realised over predicted step times by degree."""


class PlanJudged(Event, frozen=True, kw_only=True):
    """Looking back at a decision: plans scored on what really arrived until the next one."""

    decision: int
    plan: str
    best: str
    regret: float
    """Value per second by which `best` would have been ahead."""
    predicted_per_s: float
    """Requests per second that were to meet their targets, of those that were decided for."""
    realised_per_s: float
    """Requests that did, by their targets, over the time judged."""
    duration_s: float


class GenerationStarted(Event, frozen=True, kw_only=True):
    """Workers were (re)started; `num_replayed` requests go on from prompt plus tokens so far."""

    generation: int
    num_replayed: int
    restart_s: float


AnyEvent = (
    Arrived
    | Routed
    | Refused
    | Downgraded
    | Started
    | StepSent
    | StepEnded
    | RankTimed
    | Displaced
    | Resumed
    | Preempted
    | Promoted
    | Finished
    | SwitchStarted
    | WaveProposed
    | WaveCommitted
    | WaveRolledBack
    | SwitchEnded
    | HandedOver
    | Evicted
    | PlanDecided
    | PlanJudged
    | GenerationStarted
)


class EventSink(Protocol):
    def emit(self, event: AnyEvent) -> None: ...


class EventLog:
    """Keeps events in memory: for tests, the simulator and short runs."""

    def __init__(self) -> None:
        self.events: list[AnyEvent] = []

    def emit(self, event: AnyEvent) -> None:
        self.events.append(event)


class FileSink:
    """Appends events to a file, one JSON object a line; flushed when the engine is idle."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "ab", buffering=1 << 16)  # noqa: SIM115 - open for the sink's life

    def emit(self, event: AnyEvent) -> None:
        self._file.write(msgspec.json.encode(event) + b"\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class BothSinks:
    """Two sinks as one."""

    def __init__(self, first: EventSink, second: EventSink) -> None:
        self.first, self.second = first, second

    def emit(self, event: AnyEvent) -> None:
        self.first.emit(event)
        self.second.emit(event)


class NullSink:
    def emit(self, event: AnyEvent) -> None:
        pass
