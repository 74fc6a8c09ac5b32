"""What the engine has to say since the last turn.

Most steps come to a token for each of their requests and no other news: one message for all.
"""

from __future__ import annotations

from nitsum.errors import ApiError
from nitsum.messages import FromEngine, Output, SwitchReport, TokenLogprobs, Tokens
from nitsum.request import Request
from nitsum.sequence import Sequence

_MAX_DONE = 1024
"""Switches that are remembered by their operation ids."""


class Outbox:
    """Collects outputs, in order."""

    def __init__(self) -> None:
        self._messages: list[FromEngine] = []
        self._columns: Tokens | None = None
        """The last message, if it has room for more tokens: each request's stay in order."""
        self._done: dict[str, SwitchReport] = {}
        """Reports of switches that were done, the oldest first."""

    def put(self, message: FromEngine) -> None:
        self._columns = None
        self._messages.append(message)

    def report(self, report: SwitchReport) -> None:
        """A switch has ended."""
        self.put(report)
        if report.ok:
            self._done[report.op_id] = report
        if len(self._done) > _MAX_DONE:
            del self._done[next(iter(self._done))]

    def repeat(self, op_id: str) -> bool:
        """Report once more how a switch went; False if none of this id was done."""
        if op_id not in self._done:
            return False
        self.put(self._done[op_id])
        return True

    def put_token(self, sequence: Sequence, token: int, plan: str) -> None:
        """A new token, and nothing else of its request: in full only if that has another place
        now than its client knows of. What else is told of a place was settled before."""
        told = (plan, sequence.group, sequence.num_displaced)
        if sequence.told != told:
            self.put_output(sequence, token, plan)
            return
        columns = self._columns
        if columns is None:
            columns = self._columns = Tokens([], [])
            self._messages.append(columns)
        columns.request_ids.append(sequence.request_id)
        columns.tokens.append(token)

    def put_output(
        self,
        sequence: Sequence,
        token: int,
        plan: str,
        logprobs: TokenLogprobs | None = None,
        logits: bytes | None = None,
        hidden: bytes | None = None,
    ) -> None:
        """A new token of a sequence and all there is to say, with its end if it has one."""
        group, started_s = sequence.group, sequence.first_scheduled_s
        sequence.told = (plan, group, sequence.num_displaced)
        self.put(
            Output(
                sequence.request_id,
                [token],
                sequence.finish_reason,
                logprobs=[] if logprobs is None else [logprobs],
                logits=[] if logits is None else [logits],
                hidden=hidden,
                tier=sequence.tier,
                reason=sequence.tier_reason,
                late=sequence.late,
                plan=plan,
                lane="" if group is None else group.name,
                num_cached=sequence.num_cached,
                queue_s=0.0 if started_s is None else started_s - sequence.request.arrival_s,
                num_displaced=sequence.num_displaced,
            )
        )

    def take(self) -> list[FromEngine]:
        messages, self._messages, self._columns = self._messages, [], None
        return messages


def error_output(request: Request, error: ApiError, tier: str) -> Output:
    """The end of a request that gets no answer."""
    return Output(
        request_id=request.request_id,
        finish_reason="error",
        error=error.message,
        error_status=error.status,
        error_code=error.code,
        retry_after_s=error.retry_after_s,
        tier=tier,
    )
