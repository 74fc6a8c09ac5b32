"""Every message that crosses a process boundary. Reading this file is reading the protocol.

    server -> engine   Submit, Abort, SwitchPlan, Drain, GetStatus
    engine -> server   Output, Tokens, SwitchReport, Status
    engine -> starter  EngineProgress, EngineReady, EngineFailed
    engine -> worker   Step, Move, Shutdown        one FIFO per rank, obeyed in order
    worker -> engine   Ready, StepDone, MoveDone, Failed

Three rules carry the worker protocol:

* A rank obeys its FIFO in order and counts the messages it has completed in shared memory (its
  *progress*); the engine counts what it sent. `Move.after` waits for a peer's count, so "after your
  last step" needs no message of its own.
* The engine sends a step to all ranks of its lane in one go. Everything a rank waits for was sent
  earlier, so ranks that share lanes cannot deadlock.
* A sequence lives on a worker as a *slot*: a row of token ids (known ones and drawn ones) and a
  page table. The row is its whole state; penalties and random streams are functions of it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from nitsum.events import PlanDecided, PlanJudged
from nitsum.plan import Group
from nitsum.request import FinishReason, Request, SamplingParams
from nitsum.snapshot import Tally
from nitsum.step import RankTime

# --- start of a worker ----------------------------------------------------------------------------

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
Fault = Literal["swap-heads", "stale-block", "lost-tail", "wrong-vocab"]


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All a worker is told when its process starts; the rest comes as messages."""

    rank: int
    num_ranks: int
    device: Device = "cpu"
    model: str
    """Checkpoint folder."""
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: Dtype = "float32"
    max_tp: int
    min_tp: int = 1
    groups: list[Group]
    """Every group of every plan, in the one order in which anything is made for them."""
    block_tokens: int
    num_units: int
    num_host_units: int = 0
    """Units of the arena (0: fill the device, report the number in `Ready`), and of host memory."""
    max_slots: int
    max_model_len: int
    max_batch_tokens: int
    max_num_seqs: int = 64
    """Sequences one step may have."""
    gpu_memory_share: float = 0.92
    """Of a GPU's memory, all that is taken when `num_units` is 0; the rest stays free."""
    num_threads: int
    seed: int = 0
    engine_address: str
    inbox_address: str
    """Where replies go, and where this rank's FIFO arrives."""
    timeout_s: float = 60.0
    """A collective or a peer that takes longer ends the generation."""
    fault: Fault | None = None
    """Plants a fault on purpose, to prove that verification can fail."""


# --- server -> engine ---------------------------------------------------------------------------


class Submit(msgspec.Struct, tag=True, frozen=True):
    request: Request


class Abort(msgspec.Struct, tag=True, frozen=True):
    """The client is gone or a stop string matched: free everything, send nothing more."""

    request_id: str


class SwitchPlan(msgspec.Struct, tag=True, frozen=True):
    """Go to `plan`. The target is absolute, so sending it twice does nothing new."""

    op_id: str
    plan: str


class Drain(msgspec.Struct, tag=True, frozen=True):
    """Accept no more; finish what is here."""


class GetStatus(msgspec.Struct, tag=True, frozen=True):
    op_id: str
    num_decisions: int = 0
    """With the status, the controller's last decisions."""


ToEngine = Submit | Abort | SwitchPlan | Drain | GetStatus

# --- engine -> server ---------------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of the drawn token, and of the most likely ones, best first."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Output(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """New tokens of one request, its end, or both."""

    request_id: str
    tokens: list[int] = []
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_status: int = 500
    error_code: str | None = None
    retry_after_s: float | None = None
    logprobs: list[TokenLogprobs] = []
    logits: list[bytes] = []
    hidden: bytes | None = None
    """Float32 [hidden size], with the first token of a request that asked for it."""
    tier: str = "default"
    reason: str | None = None
    """Why the tier it is served as is not the one it asked for."""
    late: bool = False
    """It was taken in that tier without a promise: it will be hardly late."""
    plan: str = ""
    lane: str = ""
    """Where it is: during a switch, a lane being emptied belongs to the old plan."""
    num_cached: int = 0
    queue_s: float = 0.0
    num_displaced: int = 0


class Tokens(msgspec.Struct, tag=True, frozen=True):
    """One new token each of many requests, of which nothing else has changed since their last
    `Output`: what most steps come to. Column by column; a request may stand here twice."""

    request_ids: list[str]
    tokens: list[int]


class WaveReport(msgspec.Struct, frozen=True):
    num_requests: int
    num_cached_blocks: int
    bytes_moved: int
    units_in_place: int
    propose_s: float
    precopy_s: float
    cutover_s: float


class SwitchReport(msgspec.Struct, tag=True, frozen=True):
    """How a switch went; sent when it ends, one way or the other."""

    op_id: str
    from_plan: str
    to_plan: str
    ok: bool
    message: str = ""
    duration_s: float = 0.0
    waves: list[WaveReport] = []
    num_left_behind: int = 0
    """Requests that could not be moved and finished where they were."""
    longest_turn_s: float = 0.0
    """The engine's longest turn while it was under way: work that kept it from sending steps."""


class LaneStatus(msgspec.Struct, frozen=True):
    group: Group
    role: str
    tiers: tuple[str, ...]
    num_running: int
    num_paused: int
    num_waiting: int
    draining: bool


class Decision(msgspec.Struct, frozen=True):
    """What the controller decided or judged, and the same in words."""

    event: PlanDecided | PlanJudged
    words: str


class Status(msgspec.Struct, tag=True, frozen=True):
    """A snapshot for health checks, metrics and dashboards."""

    op_id: str
    plan: str
    plans: list[str]
    switching_to: str | None
    lanes: list[LaneStatus]
    kv_used: list[float]
    """Share of the arena in use by requests, per rank."""
    num_waiting: int
    num_running: int
    seconds_since_step: float
    generation: int
    draining: bool
    now_s: float = 0.0
    """The engine's clock; times in `tally` are read against it."""
    tally: Tally | None = None
    decisions: list[Decision] = []
    """The newest last; as many as were asked for."""


FromEngine = Output | Tokens | SwitchReport | Status

# --- engine -> worker ---------------------------------------------------------------------------


class Join(msgspec.Struct, frozen=True, array_like=True):
    """A slot starts (or starts anew) on all ranks of a lane.

    `tokens` fills its row from 0; empty when a `Move` brought the row. Tokens before `num_known`
    are never overwritten by sampling (replay, teacher forcing). The answer begins at `num_prompt`.
    """

    slot: int
    tokens: list[int]
    num_prompt: int
    num_known: int
    sampling: SamplingParams


class Pages(msgspec.Struct, frozen=True, array_like=True):
    """From entry `first` on, the page table of `slot` reads `pages[i]` on the lane's i-th rank."""

    slot: int
    first: int
    pages: list[list[int]]


class Work(msgspec.Struct, frozen=True, array_like=True):
    """Compute `num_tokens` positions of a slot from `start`; `samples` then draws one token."""

    slot: int
    start: int
    num_tokens: int
    samples: bool


class Step(msgspec.Struct, tag=True, frozen=True):
    """One forward pass of one lane; the same message goes to all its ranks."""

    step_id: int
    epoch: int
    group: Group
    joins: list[Join]
    pages: list[Pages]
    work: list[Work]


class Pull(msgspec.Struct, frozen=True, array_like=True):
    """Copy units out of a peer's arena (or the own one), all layers, K and V."""

    src_rank: int
    src_units: list[int]
    dst_units: list[int]


class RowPull(msgspec.Struct, frozen=True, array_like=True):
    """Copy the first `num_tokens` of a slot's row out of a peer's memory (or the own one)."""

    src_rank: int
    src_slot: int
    dst_slot: int
    num_tokens: int


class Move(msgspec.Struct, tag=True, frozen=True):
    """Sent to a destination rank, which pulls; the source does nothing and knows nothing.

    Before it starts, each `(rank, count)` in `after` must have completed `count` messages.
    `saves` copy own units into own host memory, `loads` units of a rank's host memory back.
    """

    move_id: int
    pulls: list[Pull]
    rows: list[RowPull] = []
    after: list[tuple[int, int]] = []
    saves: list[Pull] = []
    loads: list[Pull] = []


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    pass


ToWorker = Step | Move | Shutdown

# --- worker -> engine ---------------------------------------------------------------------------


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Weights are loaded and everything is warm. `phases` says how long each part took, seconds."""

    rank: int
    num_units: int
    phases: dict[str, float]
    memory_bytes: dict[str, int]
    driver_name: str = ""
    """What the driver calls the rank's GPU; empty on a CPU."""


class StepDone(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """From the lane's leader: the drawn tokens, in the order of the step's sampling work."""

    step_id: int
    rank: int
    tokens: list[int]
    seconds: float
    """Time the worker spent in the step, waiting for peers included."""
    logprobs: list[TokenLogprobs | None] = []
    logits: list[bytes | None] = []
    hidden: list[bytes | None] = []
    """Float32 [hidden size] of the position a token was drawn from, where it was asked for."""
    idle_s: float = 0.0
    """On a GPU: time from the end of what the rank's device did before to the start of the step."""
    waited_s: float = 0.0
    """Of `seconds`, inside collectives, as far as the rank can tell."""


class StepsTimed(msgspec.Struct, tag=True, frozen=True):
    """From the other ranks of lanes: what their last steps took them, a few at a time."""

    rank: int
    steps: list[RankTime]


class MoveDone(msgspec.Struct, tag=True, frozen=True):
    move_id: int
    rank: int
    seconds: float
    bytes: int


class Failed(msgspec.Struct, tag=True, frozen=True):
    """A worker's last words; its generation ends."""

    rank: int
    message: str


FromWorker = Ready | StepDone | StepsTimed | MoveDone | Failed

# --- engine process -> whoever started it ------------------------------------------------------


class EngineReady(msgspec.Struct, tag=True, frozen=True):
    """All workers are warm; goes to whoever started the engine process."""

    max_request_tokens: int
    """Prompt plus answer a request may have."""
    workers: list[Ready]


class EngineProgress(msgspec.Struct, tag=True, frozen=True):
    """One sentence about the start, for whoever waits for it."""

    sentence: str


class EngineFailed(msgspec.Struct, tag=True, frozen=True):
    """The engine process cannot start, or ends; the message is meant for the user."""

    message: str


EngineStart = EngineReady | EngineProgress | EngineFailed

to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
to_worker_decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
from_worker_decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
engine_start_decoder: msgspec.msgpack.Decoder[EngineStart] = msgspec.msgpack.Decoder(EngineStart)
encode = msgspec.msgpack.Encoder().encode
