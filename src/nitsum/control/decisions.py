"""Decisions in words: what was seen, what was chosen, what it would have cost to be elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nitsum.events import (
    AnyEvent,
    PlanDecided,
    PlanJudged,
    PlanScored,
    SwitchEnded,
    SwitchStarted,
    TierObserved,
)

MAX_OTHERS = 4
"""Plans not taken that a sentence names."""


def words(event: PlanDecided | PlanJudged) -> str:
    """One paragraph about one decision."""
    return _decided(event) if isinstance(event, PlanDecided) else _judged(event)


def _decided(event: PlanDecided) -> str:
    verb = f"stayed in {event.plan}" if event.chosen == event.plan else f"went to {event.chosen}"
    lines = [
        f"#{event.decision} at {event.at_s:.1f} s ({event.trigger}): {verb}: {event.reason}.",
        f"   arriving: {'; '.join(_tier(name, seen) for name, seen in event.load.items())}",
        f"   scores:   {_scores(event)}",
    ]
    if event.correction:
        factors = ", ".join(f"TP{d} x{f:.2f}" for d, f in sorted(event.correction.items()))
        lines.append(f"   steps took, against the prediction: {factors}")
    return "\n".join(lines)


def _tier(name: str, seen: TierObserved) -> str:
    waiting = f", {seen.num_waiting} waiting" if seen.num_waiting else ""
    return (
        f"{name} {seen.rate_per_s:.2f}/s of {seen.prompt_tokens:.0f}+{seen.output_tokens:.0f} "
        f"tokens{waiting}"
    )


def _scores(event: PlanDecided) -> str:
    own = next((score for score in event.scores if score.plan == event.plan), None)
    others = [score for score in event.scores if score is not own][:MAX_OTHERS]
    named = ([] if own is None else [own]) + others
    left_out = len(event.scores) - len(named)
    more = f"; {left_out} more below" if left_out > 0 else ""
    return "; ".join(_score(score, event.plan) for score in named) + more


def _score(score: PlanScored, current: str) -> str:
    if score.plan == current:
        return f"{score.plan} (in force) {score.value:.2f}/s"
    return f"{score.plan} {score.value:.2f}/s less {score.switch_cost:.2f} for the way"


def _judged(event: PlanJudged) -> str:
    if event.best == event.plan:
        verdict = "no other plan would have been ahead"
    else:
        verdict = f"{event.best} would have been ahead by {event.regret:.2f}/s (the regret)"
    return (
        f"#{event.decision} looked back on after {event.duration_s:.0f} s in {event.plan}: "
        f"{verdict}; predicted {event.predicted_per_s:.2f} requests/s in time, "
        f"realised {event.realised_per_s:.2f}."
    )


def told(events: Iterable[AnyEvent], *, all_windows: bool = False) -> Iterator[str]:
    """A run's decisions and switches; windows in which nothing changed only if `all_windows`."""
    for event in events:
        match event:
            case PlanDecided():
                if all_windows or event.chosen != event.plan:
                    yield words(event)
            case PlanJudged():
                if all_windows or event.regret > 0.0:
                    yield words(event)
            case SwitchStarted():
                yield f"   switch {event.from_plan} -> {event.to_plan}: {event.reason}"
            case SwitchEnded():
                yield _ended(event)
            case _:
                pass


def _ended(event: SwitchEnded) -> str:
    done = "done" if event.ok else f"not done ({event.message})"
    left = f", {event.num_left_behind} requests stayed behind" if event.num_left_behind else ""
    return (
        f"   switch to {event.to_plan} {done} after {event.duration_s * 1e3:.0f} ms, "
        f"{event.bytes_moved / 1e6:.0f} MB moved{left}"
    )


def summary(events: Iterable[AnyEvent]) -> str:
    """The run in one line."""
    decided = changed = 0
    judged: list[PlanJudged] = []
    for event in events:
        if isinstance(event, PlanDecided):
            decided += 1
            changed += event.chosen != event.plan
        elif isinstance(event, PlanJudged):
            judged.append(event)
    if not decided:
        return "No decisions: the controller was off (--controller static), or nothing arrived."
    line = f"{decided} decisions, {changed} changes of plan"
    span_s = sum(event.duration_s for event in judged)
    if not span_s:
        return f"{line}."
    regret = sum(event.regret * event.duration_s for event in judged) / span_s
    predicted = sum(event.predicted_per_s * event.duration_s for event in judged) / span_s
    realised = sum(event.realised_per_s * event.duration_s for event in judged) / span_s
    return (
        f"{line}; mean regret {regret:.3f}/s; in time: predicted {predicted:.2f}/s, "
        f"realised {realised:.2f}/s."
    )
