"""One rank at work: obeys steps and moves, and knows nothing of why they were sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nitsum.messages import (
    Join,
    Move,
    MoveDone,
    Pages,
    Step,
    StepDone,
    StepsTimed,
    Work,
    WorkerSpec,
)
from nitsum.model.decoder import Computed
from nitsum.model.interface import StepInput
from nitsum.plan import Group
from nitsum.request import SamplingParams
from nitsum.shape import Geometry
from nitsum.shared import Progress, Region, Shared, comm_layout, row_tokens
from nitsum.step import RankTime, RankTimes
from nitsum.worker import arena as arenas
from nitsum.worker.comm import GroupComm
from nitsum.worker.grammar import GrammarMasks
from nitsum.worker.move import Mover
from nitsum.worker.sampler import Drawn, sample
from nitsum.worker.slots import Slots, map_rows

Forward = Callable[[StepInput, GroupComm, arenas.Pages], Computed]
"""One pass of the model on this rank."""

WARM_UP_TOKENS = 8


class Runner:
    """A rank's slots, arena and groups around its model."""

    def __init__(
        self, spec: WorkerSpec, geometry: Geometry, shared: Shared, forward: Forward
    ) -> None:
        self._spec = spec
        self._forward = forward
        self._progress = Progress(shared.progress)
        self._comms = _make_comms(spec, geometry, shared)
        kv = _map_arenas(spec, geometry, shared.arenas, spec.num_units)
        rows = [map_rows(region, spec.max_slots, row_tokens(spec)) for region in shared.rows]
        self._times = RankTimes()
        self._pages = {group: kv[spec.rank].pages(group.degree) for group in self._comms}
        self._slots = Slots(rows[spec.rank], spec.block_tokens)
        self._grammars = GrammarMasks(Path(spec.model))
        self._mover = Mover(
            spec.rank,
            kv,
            rows,
            self._progress,
            spec.timeout_s,
            spec.fault,
            _map_arenas(spec, geometry, shared.hosts, spec.num_host_units),
        )

    def obey(self, message: Step | Move) -> StepDone | StepsTimed | MoveDone | None:
        """Carry a message out and count it as completed. A step is reported by its leader; the
        others tell now and then what steps took them."""
        done = self._step(message) if isinstance(message, Step) else self._mover.move(message)
        self._progress.advance(self._spec.rank)
        return done

    def warm_up(self, timeout_s: float) -> None:
        """A prefill and a decode step in each group of this rank, in the order of the spec.

        Waits up to `timeout_s` for ranks that still load.
        """
        for comm in self._comms.values():
            comm.timeout_s = timeout_s
        for group in self._comms:
            for step in _warm_up_steps(group, self._spec):
                self._step(step)
        for comm in self._comms.values():
            comm.timeout_s = self._spec.timeout_s
        self._times = RankTimes()

    @torch.inference_mode()
    def _step(self, step: Step) -> StepDone | StepsTimed | None:
        started_s = time.monotonic()
        comm = self._comms[step.group]
        self._take_in(step, comm.member)
        computed = self._forward(self._slots.step_input(step.work), comm, self._pages[step.group])
        drawn = self._sample(step, comm, computed)
        took = RankTime(step.step_id, time.monotonic() - started_s, comm.take_waited_s())
        if drawn is None:
            told = self._times.add(took)
            return StepsTimed(self._spec.rank, told) if told else None
        return StepDone(
            step.step_id,
            self._spec.rank,
            drawn.tokens,
            took.seconds,
            *drawn[1:],
            waited_s=took.waited_s,
        )

    def _take_in(self, step: Step, member: int) -> None:
        for join in step.joins:
            self._slots.join(join)
        for pages in step.pages:
            self._slots.set_pages(pages, member)

    def _sample(self, step: Step, comm: GroupComm, computed: Computed) -> Drawn | None:
        """The leader draws; every rank writes the tokens into its rows. None but on the leader."""
        logits, hidden = computed
        draws = self._slots.draws(step.work)
        drawn = sample(logits, draws, self._grammars, hidden) if comm.is_leader else None
        if draws:
            tokens = comm.broadcast(None if drawn is None else drawn.tokens, len(draws))
            self._slots.record(step.work, tokens)
        return drawn


def _make_comms(spec: WorkerSpec, geometry: Geometry, shared: Shared) -> dict[Group, GroupComm]:
    """The groups this rank is in, in the order of the spec."""
    wrong_vocab = spec.fault == "wrong-vocab"
    return {
        group: GroupComm(
            group,
            spec.rank,
            group_shared,
            comm_layout(spec, geometry, group),
            spec.timeout_s,
            reverse_vocab=wrong_vocab,
        )
        for group, group_shared in zip(spec.groups, shared.groups, strict=True)
        if spec.rank in group.ranks
    }


def _map_arenas(
    spec: WorkerSpec, geometry: Geometry, regions: Sequence[Region], num_units: int
) -> list[arenas.Arena]:
    """Of all ranks; none if there is no room for any unit."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return [
        arenas.Arena(region, geometry, num_units, spec.block_tokens, dtype)
        for region in regions
        if num_units
    ]


def _warm_up_steps(group: Group, spec: WorkerSpec) -> tuple[Step, Step]:
    """Work for slot 0 and page 0, which nobody uses yet."""
    num_tokens = min(WARM_UP_TOKENS, spec.block_tokens, spec.max_model_len, spec.max_batch_tokens)
    join = Join(0, [0] * num_tokens, num_tokens, num_tokens, SamplingParams())
    pages = Pages(0, 0, [[0]] * group.degree)
    prefill = Step(0, 0, group, [join], [pages], [Work(0, 0, num_tokens, True)])
    decode = Step(0, 0, group, [], [], [Work(0, num_tokens - 1, 1, True)])
    return prefill, decode
