"""Which prompts a busy lane takes on, step by step."""

from __future__ import annotations

from nitsum.bench.deciding import make_core
from nitsum.request import Request, SamplingParams
from nitsum.sched.composed import Composed
from nitsum.sched.lane import LaneScheduler

STEP_S = 0.016


class BusyLane:
    """The lane of an 8B model on one GPU; every step lasts as long as predicted."""

    def __init__(self) -> None:
        self.core = make_core("TP1", 1, 64)
        self.lane = next(iter(self.core.generation.loops.values())).scheduler
        self.now = 0.0
        self.num_submitted = 0

    def submit(self, tier: str, count: int, num_prompt: int, max_tokens: int = 200) -> None:
        for _ in range(count):
            self.num_submitted += 1
            request = Request(
                f"r{self.num_submitted}",
                [1] * num_prompt,
                SamplingParams(max_tokens=max_tokens),
                tier=tier,
                arrival_s=self.now,
                prefix_hashes=[1000 * self.num_submitted + i for i in range(num_prompt // 16)],
            )
            self.core.submit(request)

    def step(self) -> Composed:
        composed = self.lane.compose(1 << 20, self.now)
        self.now += composed.predicted_s or STEP_S
        for sequence, _, num_tokens, samples in composed.chunks:
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = self.now
            sequence.num_dispatched += num_tokens
            if samples:
                sequence.tokens.append(7)
                sequence.first_token_s = sequence.first_token_s or self.now
                if sequence.has_all_samples:
                    self.core.committer.finish(self.core.generation, sequence, "length")
        for sequence in composed.put_back:
            self.core.generation.put_back(sequence)
        return composed


def busy_with_priority(lane: BusyLane) -> None:
    """Decodes that need short steps."""
    lane.submit("priority", 8, 32, max_tokens=100_000)
    while lane.lane.num_running < 8 or any(s.in_prefill for s in lane.lane.running[0]):
        lane.step()


def test_late_prompts_get_slots_as_the_steps_come_to_them():
    """KV for prompts that then give it back unused costs more than everything else does."""
    lane = BusyLane()
    busy_with_priority(lane)
    lane.submit("default", 200, 600, max_tokens=2)
    for sequence in list(lane.core.sequences.values()):
        if sequence.tier == "default":
            sequence.lost_after_s = sequence.first_due_s = sequence.missed_after_s = lane.now - 1
    num_put_back = num_done = 0
    for _ in range(600):
        step = lane.step()
        num_put_back += len(step.put_back)
        num_done += sum(c.samples and c.start < c.sequence.num_prompt for c in step.chunks)
        assert lane.lane.num_running <= 64
    assert num_done > 50
    assert num_put_back < 0.2 * num_done


def test_late_prompts_come_to_their_turn_beside_a_lane_that_leaves_no_time():
    """A step without anything says nothing about what the next one takes."""
    lane = BusyLane()
    neighbour = LaneScheduler(lane.lane.lane, lane.lane.setting)
    lane.submit("priority", 1, 16)
    (urgent,) = lane.core.sequences.values()
    lane.lane.leave(urgent)
    neighbour.add(urgent)
    neighbour.next_start_s = 0.0
    lane.lane.neighbours = [neighbour]
    lane.submit("default", 3, 600, max_tokens=2)
    late = [s for s in lane.core.sequences.values() if s.tier == "default"]
    lane.now = 1.0
    for sequence in late:
        sequence.lost_after_s = sequence.first_due_s = sequence.missed_after_s = 0.0
    for _ in range(100):
        lane.step()
    assert all(sequence.first_token_s is not None for sequence in late)
