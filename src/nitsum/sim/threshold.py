"""The threshold baseline: the layout follows the tokens of recent steps, and nothing else.

Under few tokens a step the widest lanes answer soonest; above, narrow ones do most. Deciding by
that alone, as Shift Parallelism does, sees neither tiers nor what a switch costs.
"""

from __future__ import annotations

from nitsum.engine.core import Core
from nitsum.metrics.records import Recorder
from nitsum.sim.system import System


class Threshold:
    """Goes to the first plan under `threshold_tokens` per step, to the last one above."""

    def __init__(self, core: Core, system: System) -> None:
        self.core = core
        self.threshold_tokens = system.threshold_tokens
        self.wide, *_, self.narrow = (plan.name for plan in system.config.plans.plans)
        self._num_seen = 0
        self._num_asked = 0

    def look(self, recorder: Recorder) -> None:
        """Called every tick: judge the steps since the last call."""
        steps = recorder.steps[self._num_seen :]
        self._num_seen = len(recorder.steps)
        switcher = self.core.generation.switcher
        if not steps or switcher.current is not None:
            return
        # A step of a narrow lane is a part of the machine's work: compare what all do together.
        num_ranks = self.core.arena.num_ranks
        work = sum((s.num_decode + s.prefill_tokens) * s.seconds for s in steps)
        per_lane = work / sum(s.seconds for s in steps)
        lanes = num_ranks / (sum(s.group.degree for s in steps) / len(steps))
        wanted = self.wide if per_lane * lanes < self.threshold_tokens else self.narrow
        if wanted != switcher.plan.name:
            self._num_asked += 1
            self.core.switch(f"threshold-{self._num_asked}", wanted)
