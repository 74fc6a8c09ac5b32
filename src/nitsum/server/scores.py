"""How each tier has fared lately, for dashboards: what ended in the last minutes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from nitsum.server.caller import now_s

WINDOW_S = 300.0
MAX_ENDED = 5000


@dataclass(frozen=True)
class Ended:
    """An answer that ended. Times are seconds."""

    at_s: float
    met: bool
    ttft_s: float | None
    tpot_s: float | None


@dataclass(frozen=True)
class Score:
    """What ended in the last `WINDOW_S`; shares and medians are None when nothing did."""

    num_ended: int
    attained: float | None
    ttft_s: float | None
    tpot_s: float | None


class Scores:
    """Answers of the last minutes, by the tier they were served as."""

    def __init__(self) -> None:
        self._ended: dict[str, deque[Ended]] = {}

    def add(self, tier: str, *, met: bool, ttft_s: float | None, tpot_s: float | None) -> None:
        ended = self._ended.setdefault(tier, deque(maxlen=MAX_ENDED))
        ended.append(Ended(now_s(), met, ttft_s, tpot_s))

    def of(self, tier: str) -> Score:
        """The tier's score now."""
        ended = self._ended.get(tier, deque[Ended]())
        while ended and ended[0].at_s < now_s() - WINDOW_S:
            ended.popleft()
        if not ended:
            return Score(0, None, None, None)
        return Score(
            num_ended=len(ended),
            attained=sum(one.met for one in ended) / len(ended),
            ttft_s=_median(one.ttft_s for one in ended),
            tpot_s=_median(one.tpot_s for one in ended),
        )


def _median(values: Iterable[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None
