"""What a verification found: differences to a reference, what passes, and the verdict."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from nitsum.bench.driver import Answer
from nitsum.bench.reference import Difference, HfModel, from_bytes
from nitsum.bench.stages import OnStage

Verdict = Literal["pass", "fail", "not proven"]


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that pass."""

    nll: float
    """Mean negative log-likelihood, nats per token."""
    logits: float
    """max |difference| / max |logit| of a position."""


TOLERANCES = {"float32": Tolerance(nll=1e-4, logits=1e-3)}
"""By dtype. Float32 sums in another order differ by about 1e-6 a layer; the bounds leave two orders
of magnitude, and a swapped head or a stale block is two orders beyond them."""


ROUNDING_RATIO = 1.5
"""In 16-bit types: our error against float32 over that of `transformers` in the same type."""
REQUEST_ROUNDING_RATIO = 3.0
"""The same of each request alone, which a fault in one of them cannot hide from."""


@dataclass
class Report:
    """What was done and what came of it."""

    num_switches: int = 0
    num_requests: int = 0
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    moved: Counter[str] = field(default_factory=Counter[str])
    num_handed_over: int = 0
    num_prefix_hits: int = 0
    num_cached_blocks: int = 0
    num_recomputed: int = 0
    num_left_behind: int = 0
    bytes_moved: int = 0
    units_in_place: int = 0
    highest_use: float = 0.0
    use_at_switch: float = 0.0
    """Highest mean over the ranks at the start of a switch."""
    against: dict[str, Difference] = field(default_factory=dict[str, Difference])
    tolerance: Tolerance | None = TOLERANCES["float32"]
    """None where results are rounded so much that only `rounding` says what is right."""
    rounding: Difference | None = None
    """Of `transformers` in the engine's dtype, against itself in float32."""
    worst_request_ratio: float = 0.0
    """Largest over requests of our error over that of `rounding`, on the same tokens."""
    errors: list[str] = field(default_factory=list[str])
    """Answers that are wrong or missing before any logits are looked at."""
    unproven: list[str] = field(default_factory=list[str])
    """What was meant to happen and did not."""

    @property
    def verdict(self) -> Verdict:
        if self.errors or not all(self.within(other) for other in self.against.values()):
            return "fail"
        return "not proven" if self.unproven else "pass"

    def within(self, difference: Difference) -> bool:
        """False for NaN too."""
        tolerance = self.tolerance
        if self.rounding is not None:
            near = difference.rms <= ROUNDING_RATIO * self.rounding.rms
            return near and self.worst_request_ratio <= REQUEST_ROUNDING_RATIO
        assert tolerance is not None
        return difference.nll_difference < tolerance.nll and difference.logits <= tolerance.logits

    @property
    def figures(self) -> dict[str, float]:
        differences = {
            f"{measure}_difference_vs_{name}": value
            for name, difference in self.against.items()
            for measure, value in (
                ("nll", difference.nll_difference),
                ("logits", difference.logits),
            )
        }
        return {
            "num_switches": self.num_switches,
            "num_requests": self.num_requests,
            "num_positions": max((d.num_positions for d in self.against.values()), default=0),
            **{f"num_moved_in_{state}": self.moved[state] for state in STATES},
            "num_handed_over": self.num_handed_over,
            "num_prefix_hits_after_move": self.num_prefix_hits,
            "num_cached_blocks_moved": self.num_cached_blocks,
            "num_recomputed": self.num_recomputed,
            "num_left_behind": self.num_left_behind,
            "moved_bytes": self.bytes_moved,
            "num_units_in_place": self.units_in_place,
            "highest_arena_use_share": self.highest_use,
            "highest_mean_use_at_switch_share": self.use_at_switch,
            **differences,
            **self._rounding_figures,
        }

    @property
    def _rounding_figures(self) -> dict[str, float]:
        if self.rounding is None:
            return {}
        ratios = {
            f"rounding_error_ratio_{name}": difference.rms / self.rounding.rms
            for name, difference in self.against.items()
        }
        return {**ratios, "worst_request_error_ratio": self.worst_request_ratio}


STATES = ("prefill", "decode", "paused")


def compare(
    report: Report, answers: list[Answer], static: list[Answer], model: HfModel, on_stage: OnStage
) -> None:
    """Fill in the report's differences to the static layout and to transformers."""
    against_hf, against_static = Difference(), Difference()
    report.against = {"transformers": against_hf, "static": against_static}
    for number, (answer, other) in enumerate(zip(answers, static, strict=True)):
        on_stage("Comparing with transformers", number, len(answers))
        name, tokens = answer.request.request_id, answer.tokens
        if not tokens or len(answer.logits) != len(tokens):
            continue  # reported already
        ours = from_bytes(answer.logits)
        against_hf.add(name, tokens, ours, model.answer_logits(answer.request.prompt, tokens))
        if len(other.logits) != len(tokens):
            report.errors.append(f"{name} has no complete answer in the static layout.")
        else:
            against_static.add(name, tokens, ours, from_bytes(other.logits))
    on_stage("Comparing with transformers", len(answers), len(answers))


def compare_rounded(
    report: Report,
    answers: list[Answer],
    static: list[Answer],
    exact: HfModel,
    rounded: HfModel,
    on_stage: OnStage,
) -> None:
    """Ours, with switches and without, and `transformers` in our dtype, all against float32."""
    report.tolerance, report.rounding = None, Difference()
    report.against = {"transformers": Difference(), "static": Difference()}
    for number, (answer, other) in enumerate(zip(answers, static, strict=True)):
        on_stage("Comparing with transformers", number, len(answers))
        name, tokens = answer.request.request_id, answer.tokens
        if not tokens or len(answer.logits) != len(tokens) or len(other.logits) != len(tokens):
            report.errors.append(f"{name} has no complete answer in both layouts.")
            continue
        wanted = exact.answer_logits(answer.request.prompt, tokens)
        theirs = rounded.answer_logits(answer.request.prompt, tokens)
        alone, rounding = Difference(), Difference()
        for difference in (report.against["transformers"], alone):
            difference.add(name, tokens, from_bytes(answer.logits), wanted)
        for difference in (report.rounding, rounding):
            difference.add(name, tokens, theirs, wanted)
        report.against["static"].add(name, tokens, from_bytes(other.logits), wanted)
        ratio = alone.rms / rounding.rms
        report.worst_request_ratio = max(
            report.worst_request_ratio, math.inf if math.isnan(ratio) else ratio
        )
    on_stage("Comparing with transformers", len(answers), len(answers))
