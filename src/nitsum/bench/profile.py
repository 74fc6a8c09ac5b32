"""Step times of this machine, measured: real workers, steps written out as messages.

For every degree all lanes of that degree run the same step at once, as they do when they serve. A
point is the mean gap between replies of one lane while steps queue behind each other: what a
running engine waits for a step, messages included.

Points are appended to a partial file as they come, and those that are there are not measured again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nitsum.bench.provenance import summary
from nitsum.config import EngineConfig
from nitsum.cost.fit import StepPoint, fit_table
from nitsum.cost.rates import LinearRate
from nitsum.cost.table import CostTable, Provenance
from nitsum.engine.executor import Executor
from nitsum.errors import ConfigError, NitsumError
from nitsum.kv.cache import ArenaShape
from nitsum.messages import (
    Join,
    Move,
    MoveDone,
    Pages,
    Pull,
    RowPull,
    Step,
    StepDone,
    StepsTimed,
    Work,
)
from nitsum.plan import Group, all_groups
from nitsum.request import SamplingParams
from nitsum.shape import round_up

REPLY_TIMEOUT_S = 120.0
POINT_S = 0.4
"""About how long one point is measured for."""
LEAST_STEP_S = 1e-5
"""No machine steps faster; a shorter gap says that the clock was read late."""
FEWEST, MOST = 3, 8
"""Steps of one point."""
MOVE_SHARES = (1 / 64, 1 / 16, 1 / 4, 1 / 2)
"""Of an arena, in one move."""
HOST_BYTES_PER_S = 10e9
OnPoint = Callable[[int, int, str], None]
"""Takes points done, points in all, and a word about the next."""


class Grid(msgspec.Struct, frozen=True):
    """Which steps are measured."""

    num_decodes: tuple[int, ...]
    chunks: tuple[int, ...]
    contexts: tuple[int, ...]
    """Of each decoding sequence, and before a chunk."""
    max_batch_tokens: int
    """A step holds at most this many, decodes included."""
    max_num_seqs: int
    """And this many sequences, the prompt's included."""


class Shape(msgspec.Struct, frozen=True, order=True):
    """One step to measure."""

    degree: int
    num_decode: int
    chunk: int
    context: int
    before: int
    """Tokens of the prompt before the chunk."""

    def point(self, seconds: float) -> StepPoint:
        n = self.chunk
        return StepPoint(
            degree=self.degree,
            num_decode=self.num_decode,
            decode_context_tokens=self.num_decode * self.context,
            prefill_tokens=n,
            prefill_context_tokens=n * self.before + n * (n + 1) // 2,
            seconds=seconds,
        )


class Measured(msgspec.Struct, frozen=True):
    """A line of the partial file."""

    shape: Shape
    seconds: float


def grid_for(config: EngineConfig, max_tokens: int) -> Grid:
    """Powers of four, and of two for chunks on GPUs; as far as slots, steps and context allow."""
    base, least = (4, 16) if config.device == "cpu" else (2, 64)
    contexts = (64, 512) if config.device == "cpu" else (128, 1024, 4096)
    most = config.max_batch_tokens
    chunks = {0, *_powers(base, max(1, most - config.max_num_seqs), least), most}
    return Grid(
        (0, *_powers(4, max(1, config.max_num_seqs - 1))),
        tuple(sorted(chunks)),
        contexts if max(contexts) < max_tokens else (max_tokens // 8, max_tokens // 2),
        most,
        config.max_num_seqs,
    )


def _powers(base: int, most: int, least: int = 1) -> list[int]:
    """least, least x base, ..., and `most` itself."""
    values: list[int] = []
    value = least
    while value < most:
        values.append(value)
        value *= base
    return [*values, most]


def shapes_of(
    grid: Grid, degrees: tuple[int, ...], room: Callable[[int], int], block_tokens: int = 16
) -> list[Shape]:
    """Every step of the grid that fits the KV `room` (tokens of one lane) of its degree."""
    found = [
        Shape(degree, num_decode, chunk, context if num_decode else 0, before)
        for degree in degrees
        for num_decode in grid.num_decodes
        for chunk in grid.chunks
        for context in (grid.contexts if num_decode else grid.contexts[:1])
        for before in (_befores(grid, num_decode) if chunk else (0,))
        if 0 < num_decode + chunk <= grid.max_batch_tokens
        and num_decode + (chunk > 0) <= grid.max_num_seqs
    ]
    return [shape for shape in found if _tokens(shape, block_tokens) <= room(shape.degree)]


def _befores(grid: Grid, num_decode: int) -> tuple[int, ...]:
    """The price of context in prefill is found without decodes beside it."""
    return (0,) if num_decode else (0, grid.contexts[-1])


def _tokens(shape: Shape, block_tokens: int) -> int:
    """That its sequences take, in whole blocks."""
    rows = [shape.context + 2] * shape.num_decode
    rows += [shape.before + shape.chunk + 1] if shape.chunk else []
    return sum(round_up(num, block_tokens) for num in rows)


class Profiler:
    """Drives started workers."""

    def __init__(self, executor: Executor, arena: ArenaShape, max_tokens: int) -> None:
        """`max_tokens`: the longest row a worker keeps."""
        self.executor = executor
        self.arena = arena
        self.max_tokens = max_tokens
        self._ids = 0

    def room(self, degree: int) -> int:
        """Tokens of KV a lane holds."""
        pages = self.arena.num_units // self.arena.page_units(Group(degree, 0))
        return pages * self.arena.block_tokens

    def measure(self, shape: Shape) -> float:
        """Seconds of one step; raises `NitsumError` when replies stay away."""
        lanes = [g for g in all_groups(self.arena.num_ranks) if g.degree == shape.degree]
        first_s = self._run(shape, lanes, 2, joins=True)
        count = int(min(MOST, max(FEWEST, POINT_S / first_s)))
        # The quicker of two: what else the machine does only adds time.
        return min(self._run(shape, lanes, count + 1, joins=False) for _ in range(2))

    def measure_moves(self) -> list[tuple[int, float]]:
        """(bytes, seconds) of pulls into rank 0 out of a peer, or out of itself if it is alone."""
        source = 1 if self.arena.num_ranks > 1 else 0
        found: list[tuple[int, float]] = []
        for share in MOVE_SHARES:
            num = max(1, int(self.arena.num_units * share))
            src = (
                list(range(num))
                if source
                else list(range(self.arena.num_units - num, self.arena.num_units))
            )
            times = [self._move(source, src, list(range(num))) for _ in range(FEWEST)]
            found.append((num * self.arena.unit_bytes, statistics.median(times)))
        return found

    def measure_cut_over(self, src: Group, dst: Group) -> float:
        """Seconds from a lane's last step to the other lane's first one, for one sequence.

        The KV is assumed to be there already; what counts is the row and the waiting.
        """
        shape = Shape(src.degree, 1, 0, 32, 0)
        self._send(shape, src, joins=True)
        after = [(rank, self.executor.num_sent(rank)) for rank in src.ranks]
        for rank in dst.ranks:
            self._ids += 1
            row = RowPull(rank if rank in src.ranks else src.leader, 0, 1, 34)
            waits = [entry for entry in after if entry[0] != rank]
            self.executor.send([rank], Move(self._ids, [], [row], waits))
        join = Join(1, [], 32, 34, SamplingParams(max_tokens=1 << 20))
        self._ids += 1
        step = Step(
            self._ids,
            0,
            dst,
            [join],
            [Pages(1, 0, self._pages(dst, 0, 34))],
            [Work(1, 33, 1, True)],
        )
        self.executor.send(dst.ranks, step)
        times = [
            at_s for reply, at_s in self._replies(2 + dst.degree) if isinstance(reply, StepDone)
        ]
        return times[-1] - times[0]

    # -- inside --

    def _move(self, source: int, src: list[int], dst: list[int]) -> float:
        self._ids += 1
        self.executor.send([0], Move(self._ids, [Pull(source, src, dst)]))
        reply, _ = next(self._replies(1))
        assert isinstance(reply, MoveDone), reply
        return reply.seconds

    def _run(self, shape: Shape, lanes: list[Group], count: int, *, joins: bool) -> float:
        """Mean gap between replies of the first lane, over `count` (at least 2) steps of all lanes.

        The mean, because replies that are received together have no gap between them.
        """
        for number in range(count):
            for lane in lanes:
                self._send(shape, lane, joins=joins and number == 0)
        ends: list[float] = []
        for reply, at_s in self._replies(count * len(lanes)):
            if isinstance(reply, StepDone) and reply.rank == lanes[0].leader:
                ends.append(at_s)
        return max(LEAST_STEP_S, (ends[-1] - ends[0]) / (count - 1))

    def _replies(self, count: int) -> Iterator[tuple[StepDone | MoveDone, float]]:
        deadline_s = time.monotonic() + REPLY_TIMEOUT_S
        while count:
            replies = self.executor.poll(1.0)
            now_s = time.monotonic()
            for reply in replies:
                if isinstance(reply, StepsTimed):
                    continue
                assert isinstance(reply, StepDone | MoveDone), reply
                yield reply, now_s
                count -= 1
            if now_s > deadline_s:
                raise NitsumError(f"A step did not end within {REPLY_TIMEOUT_S:g} s.")

    def _send(self, shape: Shape, lane: Group, *, joins: bool) -> None:
        """Slots of a lane are its own: lanes of one degree share no rank."""
        self._ids += 1
        rows = [(slot, shape.context, 1) for slot in range(shape.num_decode)]
        if shape.chunk:
            rows.append((shape.num_decode, shape.before, shape.chunk))
        step = Step(
            self._ids,
            0,
            lane,
            [_join(slot, start + num + 1) for slot, start, num in rows] if joins else [],
            list(self._page_updates(lane, rows)) if joins else [],
            [Work(slot, start, num, True) for slot, start, num in rows],
        )
        self.executor.send(lane.ranks, step)

    def _page_updates(self, lane: Group, rows: list[tuple[int, int, int]]) -> Iterator[Pages]:
        """Pages of their own for every sequence, so that no cache helps."""
        first = 0
        for slot, start, num in rows:
            yield Pages(slot, 0, self._pages(lane, first, start + num + 1))
            first += -(-(start + num + 1) // self.arena.block_tokens)

    def _pages(self, lane: Group, first: int, num_tokens: int) -> list[list[int]]:
        num = -(-num_tokens // self.arena.block_tokens)
        return [list(range(first, first + num))] * lane.degree


def _join(slot: int, num_tokens: int) -> Join:
    """A row of known tokens: what is drawn is thrown away, so a step can be run again."""
    tokens = [16 + (slot + i) % 64 for i in range(num_tokens)]
    return Join(slot, tokens, num_tokens, num_tokens, SamplingParams(temperature=0.0))


# --- a whole profile ------------------------------------------------------------------------------


@dataclass
class Partial:
    """Points on disk, one JSON object a line."""

    path: Path

    def read(self) -> dict[Shape, float]:
        """What an earlier run measured; a line that was cut off is measured again."""
        found: dict[Shape, float] = {}
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines():
                try:
                    measured = msgspec.json.decode(line, type=Measured)
                except msgspec.DecodeError:
                    continue
                found[measured.shape] = measured.seconds
        return found

    def add(self, shape: Shape, seconds: float) -> None:
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(Measured(shape, seconds)) + b"\n")


def measure_points(
    profiler: Profiler, shapes: list[Shape], partial: Partial, on_point: OnPoint
) -> list[StepPoint]:
    """All shapes, those of the partial file without measuring."""
    known = partial.read()
    for number, shape in enumerate(shapes):
        if shape in known:
            continue
        on_point(number, len(shapes), _word(shape))
        known[shape] = profiler.measure(shape)
        partial.add(shape, known[shape])
    on_point(len(shapes), len(shapes), "done")
    return [shape.point(known[shape]) for shape in shapes]


def _word(shape: Shape) -> str:
    return f"TP{shape.degree}: {shape.num_decode} decoding, {shape.chunk} prefill tokens"


def linear_rate(points: list[tuple[int, float]]) -> LinearRate:
    """launch + bytes / rate through the points, by least squares of relative errors."""
    if len(points) < 2:
        raise ConfigError("At least two sizes are needed to fit a rate.")
    weights = [1.0 / seconds**2 for _, seconds in points]
    total = sum(weights)
    x = sum(w * n for w, (n, _) in zip(weights, points, strict=True)) / total
    y = sum(w * s for w, (_, s) in zip(weights, points, strict=True)) / total
    covariance = sum(w * (n - x) * (s - y) for w, (n, s) in zip(weights, points, strict=True))
    variance = sum(w * (n - x) ** 2 for w, (n, _) in zip(weights, points, strict=True))
    slope = max(covariance / variance, 1e-13) if variance else y / x
    return LinearRate(max(0.0, y - slope * x), 1.0 / slope)


def table_of(
    points: list[StepPoint], moves: list[tuple[int, float]], model: str, notes: str
) -> CostTable:
    """The fitted table with where it comes from; host copies are not measured, and say so."""
    found = summary({}, notes)
    provenance = Provenance(
        kind="measured",
        hardware=found["hardware"],
        versions=found["versions"],
        date=found["date"],
        command=found["command"],
        notes=notes,
    )
    return fit_table(
        points,
        model=model,
        provenance=provenance,
        move=linear_rate(moves),
        offload=LinearRate(50e-6, HOST_BYTES_PER_S, False),
    )
