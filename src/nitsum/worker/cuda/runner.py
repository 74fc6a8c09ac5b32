"""One GPU rank at work: launches what messages say, and reports what streams have done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch

from nitsum.messages import Move, MoveDone, Step, StepDone, StepsTimed, Work
from nitsum.plan import Group
from nitsum.shared import Progress
from nitsum.step import RankTime, RankTimes
from nitsum.worker.cuda.buckets import StepShape
from nitsum.worker.cuda.grammar import DeviceGrammars
from nitsum.worker.cuda.lane import CudaLane
from nitsum.worker.cuda.mover import CudaMover, Launched
from nitsum.worker.cuda.ordering import units_of_step
from nitsum.worker.cuda.packing import pack
from nitsum.worker.cuda.sampling import (
    DeviceSampler,
    Reports,
    captured_needs,
    read_hidden,
    read_logits,
    read_logprobs,
)
from nitsum.worker.cuda.signals import Signals
from nitsum.worker.cuda.state import DeviceState, record_event, to_host

POLL_S = 20e-6
"""Pause between looks while the device works; a step takes a hundred times as long, and the next
one is queued behind it."""


@dataclass(frozen=True)
class StepUnderWay:
    """What is needed to report a step once `end` has happened; tokens only on the leader."""

    step_id: int
    before: torch.cuda.Event | None
    """The end of what the main stream did before."""
    start: torch.cuda.Event
    end: torch.cuda.Event
    tokens: torch.Tensor | None
    reports: Reports | None

    @property
    def seconds(self) -> float:
        """Once it has ended."""
        return self.start.elapsed_time(self.end) / 1e3


@dataclass(frozen=True)
class MoveUnderWay:
    move_id: int
    launched: Launched

    @property
    def end(self) -> torch.cuda.Event:
        return self.launched.end


class CudaRunner:
    """A rank's lanes, state and mover. Every method returns without waiting for the device."""

    def __init__(
        self,
        rank: int,
        lanes: dict[Group, CudaLane],
        state: DeviceState,
        sampler: DeviceSampler,
        grammars: DeviceGrammars,
        mover: CudaMover,
        signals: Signals,
        progress: Progress,
        units_per_page: dict[Group, int],
    ) -> None:
        self._rank = rank
        self._lanes = lanes
        self._state = state
        self._sampler = sampler
        self._grammars = grammars
        self._mover = mover
        self._signals = signals
        self._progress = progress
        self._units_per_page = units_per_page
        self._num_obeyed = 0
        self._last_end: torch.cuda.Event | None = None
        """Of the newest message on the main stream."""
        self._steps: deque[StepUnderWay | MoveUnderWay] = deque()
        """Of the main stream, in order."""
        self._beside: list[MoveUnderWay] = []
        self._times = RankTimes()

    @property
    def is_idle(self) -> bool:
        """Nothing is under way."""
        return not self._steps and not self._beside

    def obey(self, message: Step | Move) -> Iterator[None]:
        """Launch a message, and count it on the main stream. Pauses between parts that take the
        host long, so that what has ended meanwhile is reported."""
        self._num_obeyed += 1
        if isinstance(message, Step):
            yield from self._step(message)
        else:
            self._move(message)
        self._mover.count(self._num_obeyed)

    def finished(self) -> Iterator[StepDone | StepsTimed | MoveDone]:
        """Replies to what is done by now. Raises `WorkerDied` if a wait on the device gave up."""
        while self._steps and self._steps[0].end.query():
            yield from self._report(self._steps.popleft())
        for move in [move for move in self._beside if move.end.query()]:
            self._beside.remove(move)
            self._mover.finish(move.launched)
            yield from self._report(move)

    # -- steps --

    def _step(self, step: Step) -> Iterator[None]:
        lane = self._lanes[step.group]
        self._wait_for_precopies(step, lane)
        start = record_event()
        shape = lane.shape_for(step.work)
        yield
        self._take_in(step, lane, shape.num_seqs)
        yield
        reports = yield from self._compute(lane, step.work, shape)
        num_draws = sum(part.samples for part in step.work)
        leads = lane.comm.is_leader
        tokens = to_host(self._sampler.tokens[:num_draws]) if leads else None
        before, self._last_end = self._last_end, record_event()
        self._steps.append(
            StepUnderWay(step.step_id, before, start, self._last_end, tokens, reports)
        )

    def _wait_for_precopies(self, step: Step, lane: CudaLane) -> None:
        per_page = self._units_per_page[step.group]
        units = units_of_step(step, lane.comm.member, per_page)
        for event in self._mover.precopies.touching(units):
            torch.cuda.current_stream().wait_event(event)

    def _take_in(self, step: Step, lane: CudaLane, width: int) -> None:
        self._sampler.join(step.joins)
        self._grammars.join(step.joins)
        self._state.take_in(pack(step, lane.comm.member, width, self._state.max_pages))

    def _compute(
        self, lane: CudaLane, work: list[Work], shape: StepShape
    ) -> Generator[None, None, Reports | None]:
        """Forward and draw; what requests asked to hear, on the leader."""
        needs = self._sampler.needs(work)
        leads = lane.comm.is_leader
        reading = self._grammars.read(work) if leads and needs.keeps_grammar else None
        arrived = None if reading is None else record_event()
        logits, draws, hidden, rows = lane.compute(shape, work)
        reports = leads and needs.reports
        shapes = needs.shapes_logits or reading is not None
        raw = logits.clone() if reports and shapes else logits
        if reading is not None and arrived is not None:
            yield from _wait_for(arrived)
            self._grammars.mask(logits, reading)
        captured = captured_needs(needs)
        if shape.is_decode and captured is not None:
            lane.draw_captured(shape, captured)
        elif logits.shape[0]:
            longest = max(part.start + part.num_tokens for part in work)
            self._sampler.draw(logits, draws, needs, lane.comm, longest)
        return self._sampler.reports(work, raw, hidden, rows) if reports else None

    # -- moves --

    def _move(self, move: Move) -> None:
        launched = self._mover.launch(move)
        under_way = MoveUnderWay(move.move_id, launched)
        if launched.beside:
            self._beside.append(under_way)
        else:
            self._steps.append(under_way)
            self._last_end = launched.end

    # -- reports --

    def _report(
        self, done: StepUnderWay | MoveUnderWay
    ) -> Iterator[StepDone | StepsTimed | MoveDone]:
        self._progress.advance(self._rank)
        if isinstance(done, MoveUnderWay):
            launched = done.launched
            self._signals.check(int(launched.late))
            seconds = launched.start.elapsed_time(launched.end) / 1e3
            yield MoveDone(done.move_id, self._rank, seconds, launched.num_bytes)
        elif done.tokens is not None:
            yield _step_done(done, done.tokens, self._rank)
        elif told := self._times.add(RankTime(done.step_id, done.seconds, 0.0)):
            yield StepsTimed(self._rank, told)


def _step_done(done: StepUnderWay, tokens: torch.Tensor, rank: int) -> StepDone:
    seconds = done.seconds
    idle_s = done.before.elapsed_time(done.start) / 1e3 if done.before else 0.0
    num_draws = len(tokens)
    if done.reports is None:
        return StepDone(done.step_id, rank, tokens.tolist(), seconds, idle_s=idle_s)
    return StepDone(
        done.step_id,
        rank,
        tokens.tolist(),
        seconds,
        read_logprobs(done.reports, num_draws),
        read_logits(done.reports, num_draws),
        read_hidden(done.reports, num_draws),
        idle_s=idle_s,
    )


def _wait_for(event: torch.cuda.Event) -> Iterator[None]:
    """Pause until `event` has happened; what is launched already goes on meanwhile."""
    while not event.query():
        time.sleep(POLL_S)
        yield
