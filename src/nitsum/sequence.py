"""What a request becomes inside the engine: its tokens, and how far steps have come with them."""

from __future__ import annotations

from enum import Enum

from nitsum.plan import Group
from nitsum.request import FinishReason, Request


class SeqState(Enum):
    WAITING = "waiting"
    """No KV yet, in a lane's queue."""
    RUNNING = "running"
    """Holds KV and may be stepped."""
    PAUSED = "paused"
    """Displaced: holds KV, not stepped until a slot is free again."""
    FINISHED = "finished"


class Sequence:
    """The engine's record of a request: its tokens and how far steps have been sent and confirmed.

    Positions count prompt and answer together. `tokens` holds what the host knows; steps run
    ahead of it, so a position may be sampled (`num_sampling` of them) before its token is here.

        0 ........ num_computed ........ num_dispatched ........ len(tokens) + num_sampling
        KV confirmed | KV written by steps in flight | to compute next
    """

    __slots__ = (
        "chain_start_s",
        "finish_reason",
        "first_due_s",
        "first_scheduled_s",
        "first_token_s",
        "group",
        "hashes",
        "late",
        "latest_start_s",
        "lost_after_s",
        "missed_after_s",
        "num_cached",
        "num_computed",
        "num_dispatched",
        "num_displaced",
        "num_most",
        "num_prompt",
        "num_restarts",
        "num_sampling",
        "pace_s",
        "promised",
        "promoted",
        "request",
        "request_id",
        "slot",
        "state",
        "stops",
        "tier",
        "tier_reason",
        "tokens",
        "told",
        "wait_from_s",
        "waited_s",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.request_id = request.request_id
        self.tokens: list[int] = list(request.prompt)
        self.num_prompt = len(request.prompt)
        self.num_most = self.num_prompt + request.sampling.max_tokens
        """Positions that prompt and answer may come to."""
        self.stops = request.sampling.stop_token_ids
        self.num_dispatched = 0
        """Positions whose KV the steps sent so far will have written."""
        self.num_computed = 0
        """Positions whose KV is confirmed."""
        self.num_sampling = 0
        """Tokens being drawn by steps in flight."""
        self.num_cached = 0
        self.num_displaced = 0
        self.num_restarts = 0
        """How often it began anew: its room was taken and its KV not kept, or all workers were
        started again, whether it had KV or not."""
        self.hashes: list[int] = list(request.prefix_hashes)
        """Hashes of its leading full blocks, as far as they are known."""
        self.tier = request.tier
        """The tier it is served as; a downgrade changes it."""
        self.tier_reason: str | None = None
        """Why that is not the tier it asked for."""
        self.state = SeqState.WAITING
        self.group: Group | None = None
        """The lane that steps it, once routed."""
        self.slot: int | None = None
        """Its row on the lane's workers, while it holds KV."""
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.finish_reason: FinishReason | None = None
        self.told: tuple[str, Group | None, int] | None = None
        """Plan, lane and displacements as its client last heard of them."""
        # What the scheduler works out once, when the sequence is queued:
        self.latest_start_s = request.arrival_s
        """When its first step must start so that its targets, its chain's included, can be met; the
        order inside a tier. It does not change while the sequence waits."""
        self.lost_after_s = float("inf")
        """Started later than this, it misses its own targets whatever happens."""
        self.first_due_s = float("inf")
        """When its first token is due."""
        self.missed_after_s = float("inf")
        """A first token later than this has missed everything there was to meet; a call of a chain
        still has its chain to keep up with."""
        self.chain_start_s: float | None = None
        """When its first step must start for the sake of its chain, if it is a call of one."""
        self.pace_s: float | None = None
        """Time per token it is held to after the first; None for deadline tiers."""
        self.promised = False
        """Admission found room for it within its tier's targets."""
        self.late = False
        """It has no promise and was taken in its tier all the same: it will be hardly late."""
        self.promoted = False
        """It waited as long as its tier allows, and goes before everything else."""
        self.wait_from_s = request.arrival_s
        """Since when it has been waiting or paused."""
        self.waited_s = 0.0
        """Time it waited or was paused before that."""

    @property
    def num_output(self) -> int:
        """Answer tokens the host has seen."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_total(self) -> int:
        """Positions that exist: known tokens and those being sampled."""
        return len(self.tokens) + self.num_sampling

    @property
    def num_remaining(self) -> int:
        """Positions the next step may compute; 1 in decode."""
        return len(self.tokens) + self.num_sampling - self.num_dispatched

    @property
    def is_confirmed(self) -> bool:
        """No step in flight contains it."""
        return not self.num_sampling and self.num_computed == self.num_dispatched

    @property
    def in_prefill(self) -> bool:
        return self.num_dispatched < self.num_prompt

    @property
    def has_all_samples(self) -> bool:
        """Nothing is left to dispatch: the answer's last token is drawn or being drawn."""
        return self.num_total >= self.num_most

    @property
    def num_known(self) -> int:
        """Leading tokens that sampling must not overwrite: known ones and forced ones."""
        return max(len(self.tokens), self.num_prompt + len(self.request.sampling.forced_tokens))

    def forget_kv(self) -> None:
        """Its KV is gone: everything is to be computed again, from prompt plus tokens so far."""
        self.num_dispatched = 0
        self.num_computed = 0
        self.num_restarts += self.state is not SeqState.WAITING  # which has none, and began nothing
        self.slot = None
        self.group = None
        self.state = SeqState.WAITING

    @property
    def is_finished(self) -> bool:
        return self.state is SeqState.FINISHED
