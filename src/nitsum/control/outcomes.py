"""Which requests met their targets, as they end: what predictions are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from nitsum.events import Arrived, Finished, Refused, StepEnded


@dataclass(slots=True)
class _Open:
    tier: str
    arrival_s: float
    ttft_s: float | None
    tpot_s: float | None
    deadline_s: float | None
    first_token_s: float | None = None


class Outcomes:
    """Follows open requests, cheaply: of their tokens only the first and the last matter."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._without_token: set[str] = set()
        self._num_met = 0

    def tier_of(self, request_id: str) -> str:
        return self._open[request_id].tier

    def arrived(self, event: Arrived) -> None:
        self._open[event.request_id] = _Open(
            event.tier,
            event.arrival_s,
            event.ttft_target_s,
            event.tpot_target_s,
            event.deadline_s,
        )
        self._without_token.add(event.request_id)

    def stepped(self, event: StepEnded) -> None:
        if not self._without_token:
            return
        for request_id, num_tokens in event.tokens:
            if num_tokens and request_id in self._without_token:
                self._without_token.discard(request_id)
                self._open[request_id].first_token_s = event.at_s

    def ended(self, event: Finished | Refused) -> None:
        request = self._open.pop(event.request_id, None)
        self._without_token.discard(event.request_id)
        if request is None or isinstance(event, Refused):
            return
        if event.reason in ("stop", "length"):
            self._num_met += _is_met(request, event)

    def take_met(self) -> int:
        """Requests that met all their targets since the last call."""
        count, self._num_met = self._num_met, 0
        return count


def _is_met(request: _Open, event: Finished) -> bool:
    if request.deadline_s is not None and event.at_s - request.arrival_s > request.deadline_s:
        return False
    # A request may end with the very step that brought its first token.
    first_s = event.at_s if request.first_token_s is None else request.first_token_s
    if request.ttft_s is not None and first_s - request.arrival_s > request.ttft_s:
        return False
    num_gaps = event.num_output - 1
    return (
        request.tpot_s is None
        or num_gaps < 1
        or (event.at_s - first_s) / num_gaps <= request.tpot_s
    )
