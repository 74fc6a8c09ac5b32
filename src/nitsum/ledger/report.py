"""What a stretch of the ledger comes to: by tenant and tier, and per hour of the machine.

All numbers come from the records; nothing is estimated. The flat comparison charges each billed
call at multiplier 1 and gives nothing back: what one price for everybody would have earned on the
very same requests. (It cannot say which customers one price would have driven away or brought.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from nitsum.ledger.records import NANO, Prices, Record, Run

_MS_PER_HOUR = 3_600_000


@dataclass
class Line:
    """Sums of one tenant's calls that were served as one tier; refused ones count where they
    would have been."""

    tenant: str
    tier: str
    num_requests: int = 0
    """Of them all, whatever their end."""
    num_ok: int = 0
    num_aborted: int = 0
    """Left by their client; what was made before is billed."""
    num_refused: int = 0
    num_errors: int = 0
    num_downgraded: int = 0
    """Served, as a less urgent tier than they asked for."""
    num_met: int = 0
    num_judged: int = 0
    """Ended by themselves, so that their targets can be judged."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    cost_nano: int = 0
    credit_nano: int = 0
    flat_nano: int = 0

    @property
    def attainment(self) -> float | None:
        """Share of judged calls that met every target."""
        return self.num_met / self.num_judged if self.num_judged else None

    def add(self, record: Record) -> None:
        self.num_requests += 1
        self.num_ok += record.status == "ok"
        self.num_aborted += record.status == "aborted"
        self.num_refused += record.status == "refused"
        self.num_errors += record.status == "error"
        if record.status != "refused":
            self.num_downgraded += record.tier_served != record.tier_asked
        self.num_judged += record.met is not None
        self.num_met += bool(record.met)
        if record.billed:
            self._add_billed(record)

    def _add_billed(self, record: Record) -> None:
        self.num_prompt_tokens += record.num_prompt
        self.num_cached_tokens += record.num_cached
        self.num_output_tokens += record.num_output
        self.cost_nano += record.cost_nano
        self.credit_nano += record.credit_nano
        flat = Prices(record.price_input, record.price_output)
        self.flat_nano += flat.cost_nano(record.num_prompt, record.num_output, 1.0)

    def merge(self, other: Line) -> None:
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))


_SUMMED = tuple(name for name in Line.__dataclass_fields__ if name not in ("tenant", "tier"))


@dataclass
class Report:
    """`lines` by tenant and tier, their sum, and the machine's hours."""

    lines: list[Line]
    total: Line
    gpu_hours: float
    """Hours that ranks were up inside the period, all ranks and servers together."""
    devices: list[str] = field(default_factory=list[str])

    def as_dict(self) -> dict[str, object]:
        """For JSON. Money is in currency units."""
        return {
            "lines": [_line_fields(line) for line in self.lines],
            "total": _line_fields(self.total),
            "gpu_hours": self.gpu_hours,
            "devices": self.devices,
            "revenue_per_gpu_hour": self.per_hour(self.total.cost_nano - self.total.credit_nano),
            "flat_revenue_per_gpu_hour": self.per_hour(self.total.flat_nano),
        }

    def per_hour(self, nano: int) -> float | None:
        """Money per GPU-hour; None before the first hour-fraction was seen."""
        return nano / NANO / self.gpu_hours if self.gpu_hours > 0 else None


def build_report(
    records: Iterable[Record],
    runs: Sequence[Run],
    *,
    tier_order: Sequence[str] = (),
    since_ms: int | None = None,
    until_ms: int | None = None,
) -> Report:
    """Sum the records, which all arrived in since..until; runs count as far as they overlap it."""
    lines: dict[tuple[str, str], Line] = {}
    for record in records:
        key = (record.tenant, record.tier_served)
        lines.setdefault(key, Line(*key)).add(record)
    total = Line("", "")
    for line in lines.values():
        total.merge(line)
    overlaps = [(run, _overlap_ms(run, since_ms, until_ms)) for run in runs]
    return Report(
        sorted(lines.values(), key=lambda line: (line.tenant, _rank(line.tier, tier_order))),
        total,
        sum(ms * run.num_ranks for run, ms in overlaps) / _MS_PER_HOUR,
        sorted({run.device for run, ms in overlaps if ms > 0}),
    )


def _overlap_ms(run: Run, since_ms: int | None, until_ms: int | None) -> int:
    start = run.started_ms if since_ms is None else max(run.started_ms, since_ms)
    end = run.seen_ms if until_ms is None else min(run.seen_ms, until_ms)
    return max(0, end - start)


def _rank(tier: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(tier) if tier in order else len(order), tier)


def _line_fields(line: Line) -> dict[str, object]:
    fields: dict[str, object] = {
        name: getattr(line, name) for name in Line.__dataclass_fields__ if name[-5:] != "_nano"
    }
    return {
        **fields,
        "attainment": line.attainment,
        "price": line.cost_nano / NANO,
        "credits": line.credit_nano / NANO,
        "revenue": (line.cost_nano - line.credit_nano) / NANO,
        "flat_revenue": line.flat_nano / NANO,
    }


def to_json(report: Report) -> str:
    return msgspec.json.format(msgspec.json.encode(report.as_dict()), indent=2).decode()
