"""What points were planned with: a model, times of its steps, sizes of steps and blocks, targets.

Servers are given the same, or a point's prediction is one of something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import msgspec

from nitsum.cost.protocol import CostModel
from nitsum.cost.shipped import same_work
from nitsum.cost.table import TableCost
from nitsum.errors import ConfigError
from nitsum.limits import StepLimits
from nitsum.metrics.targets import Targets
from nitsum.shape import ModelShape
from nitsum.sim.system import Site


class Basis(msgspec.Struct, frozen=True, kw_only=True):
    """Kept with the points."""

    model: str
    """A shape's name, or the name of a checkpoint's folder."""
    shape: ModelShape
    steps_sha256: str | None
    """Of the table of step times; None: by the analytic model."""
    limits: StepLimits
    targets_sha256: str

    def check(self, shape: ModelShape, steps: CostModel | None, targets: Targets) -> None:
        """Raises `ConfigError` naming what the points were not planned with."""
        if not same_work(shape, self.shape):
            raise ConfigError(
                f"The points were planned for {self.model}, and this is another shape of model."
            )
        if steps_digest(steps) != self.steps_sha256:
            raise ConfigError(
                f"The points were planned with {_table_named(self.steps_sha256)}, and this is "
                f"{_table_named(steps_digest(steps))}. Give theirs (--cost) or plan anew."
            )
        if digest(targets) != self.targets_sha256:
            raise ConfigError(
                "The points were planned with other targets than those beside them. Plan anew."
            )


def basis_of(site: Site, targets: Targets) -> Basis:
    """Of points that are planned for `site`."""
    return Basis(
        model=Path(site.model).name,
        shape=site.shape,
        steps_sha256=steps_digest(site.cost),
        limits=site.limits,
        targets_sha256=digest(targets),
    )


def steps_digest(cost: CostModel | None) -> str | None:
    """Of a measured table; None for the analytic model."""
    return digest(cost.table) if isinstance(cost, TableCost) else None


def digest(content: object) -> str:
    """Of what msgspec can encode, however the file it came from was laid out."""
    return sha256(msgspec.json.encode(content)).hexdigest()


def source_digest(paths: Iterable[Path]) -> str:
    """Of code and data that decide what a simulated run comes to."""
    found = sha256()
    for path in sorted(paths):
        if path.is_file() and path.suffix != ".pyc":
            found.update(f"{path} {path.stat().st_size}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def _table_named(sha256: str | None) -> str:
    return "the analytic model" if sha256 is None else f"the table of steps {sha256[:12]}"
