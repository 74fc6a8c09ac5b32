"""What the engine is told at start: frozen, checked once, never written back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nitsum.errors import ConfigError
from nitsum.limits import STEP_LIMITS, check_mixed_tokens
from nitsum.messages import Device, Dtype, Fault
from nitsum.plan import PlanSet
from nitsum.tier import DEFAULT_TIERS, Tier

Policy = Literal["fcfs", "priority", "nitsum"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything the engine and its workers need; facts found later live elsewhere."""

    model: str
    """Checkpoint folder (a GGUF file is converted into one before)."""
    plans: PlanSet
    device: Device = "cpu"
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: Dtype = "float32"
    min_tp: int = 1
    """Each rank holds 1/min_tp of the weights; no lane may be narrower."""
    block_tokens: int = STEP_LIMITS["cpu"].block_tokens
    """Tokens of one KV block. Like the sizes of steps below, what CPU ranks have by default; for
    others, take it from `STEP_LIMITS`."""
    kv_bytes: int = 256 << 20
    """KV arena per rank, bytes; 0 on a GPU means all memory that is left."""
    gpu_memory_share: float = 0.92
    """Of a GPU's memory, all that Nitsum takes when `kv_bytes` is 0."""
    max_model_len: int = 0
    """Longest prompt plus answer, tokens; 0 takes the checkpoint's."""
    max_num_seqs: int = STEP_LIMITS["cpu"].max_num_seqs
    """Sequences one lane steps at once."""
    max_batch_tokens: int = STEP_LIMITS["cpu"].max_batch_tokens
    """Tokens one step may compute."""
    max_mixed_tokens: int = 0
    """Tokens of a step that has decodes, which its prompts keep waiting; 0: as of any step."""
    num_threads: int = 0
    """CPU threads of one worker; 0 divides the machine's cores between the workers."""
    tiers: tuple[Tier, ...] = DEFAULT_TIERS
    policy: Policy = "nitsum"
    """How lanes order their work; the others are baselines on the same code."""
    host_kv_bytes: int = 0
    """Host memory per rank for KV of displaced requests; 0 has them compute it again when the arena
    is full."""
    chain_idle_s: float = 60.0
    """How long the prefix of an agent chain is kept after its last call ended."""
    prefix_cache: bool = True
    seed: int = 0
    """Of dummy weights."""
    timeout_s: float = 60.0
    """A step or a move that takes longer ends the worker generation."""
    precopy_units: int = 0
    """Units of pre-copies one rank may have before it; 0 is 256 on a CPU, where steps in between
    wait for them, and 1024 on a GPU."""
    controller: Literal["static", "adaptive"] = "static"
    """adaptive: the engine changes plans by itself when that pays; static: only when told to."""
    cost: str = ""
    """Step times to start from: a file of `nitsum profile`, or `analytic`; empty is the table that
    comes with Nitsum for these devices and this model, and else the analytic model."""
    check_accounting: bool = False
    """Run `check()` after every step (tests, verification)."""
    events_path: str = ""
    """Append every event to this file, one JSON object a line; empty writes none."""
    fault: Fault | None = None

    def __post_init__(self) -> None:
        narrowest = self.plans.degrees[0]
        if narrowest < self.min_tp:
            raise ConfigError(
                f"A plan has a TP{narrowest} lane, but min_tp is {self.min_tp}: no rank holds "
                f"enough of the weights. Lower min_tp or drop the plan."
            )
        for name in ("block_tokens", "max_num_seqs", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1.")
        if not 0.0 < self.gpu_memory_share <= 1.0:
            raise ConfigError("gpu_memory_share must be above 0 and at most 1.")
        if self.mixed_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens or max_mixed_tokens ({self.mixed_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}): a full decode batch would not fit one step."
            )
        check_mixed_tokens(self.max_mixed_tokens, self.max_batch_tokens)

    @property
    def mixed_tokens(self) -> int:
        """Tokens of a step that has decodes."""
        return self.max_mixed_tokens or self.max_batch_tokens

    @property
    def num_ranks(self) -> int:
        return self.plans.num_ranks

    @property
    def max_tp(self) -> int:
        return self.plans.max_tp

    @property
    def units_under_way(self) -> int:
        """See `precopy_units`."""
        return self.precopy_units or (256 if self.device == "cpu" else 1024)

    @property
    def max_slots(self) -> int:
        """Rows a worker keeps: every lane of any plan full, four times over for sequences that are
        paused or on their way between lanes. Slot numbers are below this."""
        return 4 * self.max_num_seqs * self.num_ranks
