"""One answer as it grows: engine outputs in, pieces for the client out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import msgspec

from nitsum.errors import ApiError
from nitsum.messages import Output, TokenLogprobs
from nitsum.request import Request
from nitsum.server.detokenize import Detokenizer, StopFinder
from nitsum.server.shapes import FinishName, ToolCall
from nitsum.server.tools import ToolCallParser


class TokenScore(msgspec.Struct, frozen=True):
    """A token's report. `offset` is where its text begins in the answer, in characters."""

    token: int
    offset: int
    logprobs: TokenLogprobs


class Piece(msgspec.Struct):
    """What one engine output adds to a choice; the last piece has a `finish_reason`."""

    index: int
    text: str = ""
    tool_calls: list[ToolCall] = []
    tokens: list[int] = []
    scores: list[TokenScore] = []
    finish_reason: FinishName | None = None

    @property
    def has_news(self) -> bool:
        """Something for the client; False while all of it is held back."""
        return bool(self.text or self.tool_calls or self.scores)

    @property
    def is_plain(self) -> bool:
        """It adds text, and nothing else: what most pieces are."""
        ends = self.finish_reason is not None
        return bool(self.text) and not (ends or self.tool_calls or self.scores)


class Answer:
    """State of choice `index`: how far it is, and what is held back."""

    def __init__(
        self,
        index: int,
        request: Request,
        detokenizer: Detokenizer,
        *,
        stops: tuple[str, ...] = (),
        tools: ToolCallParser | None = None,
        num_prompt: int | None = None,
    ) -> None:
        self.index = index
        self.request = request
        self.num_tokens = 0
        """Tokens the engine drew up to where the answer ends, the stop token included."""
        self.num_cached = 0
        self.tier = request.tier
        """The tier it is served as, once the engine has said."""
        self._detokenizer = detokenizer
        self._stops = StopFinder(stops)
        self._tools = tools
        self._stop_ids = frozenset(request.sampling.stop_token_ids)
        self._num_decoded_chars = 0
        self._num_released_chars = 0
        self._scores: deque[TokenScore] = deque()
        self._is_simple = not stops and tools is None and request.sampling.logprobs is None
        """No text is ever held back but for incomplete characters."""

    def add(self, output: Output) -> Piece:
        """The piece an output makes. After its `finish_reason` nothing may follow.

        Raises `ApiError` when the output is an error.
        """
        self.note(output)
        piece = Piece(self.index)
        if self._is_simple and output.finish_reason is None and not output.logprobs:
            self._add_text(piece, output.tokens)
            return piece
        for token, scores in _with_scores(output):
            self._add_token(piece, token, scores)
            if self._ended_here(piece, token, output):
                break
        if piece.finish_reason is None and output.finish_reason is not None:
            piece.finish_reason = "length" if output.finish_reason == "length" else "stop"
        if piece.finish_reason is not None:
            self._finish(piece)
        return piece

    def note(self, output: Output) -> None:
        """What an output says beside its tokens; raises `ApiError` when it is an error."""
        if output.error is not None or output.finish_reason in ("abort", "error"):
            raise error_of(output)
        self.tier = output.tier
        self.num_cached = output.num_cached

    def _add_text(self, piece: Piece, tokens: list[int]) -> None:
        """What the loop of `add` does, where nothing is looked for and nothing held back."""
        self.num_tokens += len(tokens)
        add = self._detokenizer.add
        piece.tokens = kept = [token for token in tokens if token not in self._stop_ids]
        piece.text = text = add(kept[0]) if len(kept) == 1 else "".join(map(add, kept))
        self._num_decoded_chars += len(text)
        self._num_released_chars += len(text)

    def _add_token(self, piece: Piece, token: int, scores: TokenLogprobs | None) -> None:
        self.num_tokens += 1
        if token in self._stop_ids:
            return
        piece.tokens.append(token)
        if scores is not None:
            self._scores.append(TokenScore(token, self._num_decoded_chars, scores))
        text = self._detokenizer.add(token)
        self._num_decoded_chars += len(text)
        self._release(piece, text)

    def _release(self, piece: Piece, text: str) -> None:
        """Hand out what neither a stop string nor a tool call may still claim."""
        if self.num_tokens > self.request.sampling.min_tokens:
            text = self._stops.add(text)
        self._num_released_chars += len(text)
        while self._scores and self._scores[0].offset < self._num_released_chars:
            piece.scores.append(self._scores.popleft())
        _append(piece, [text] if self._tools is None else self._tools.add(text))

    def _ended_here(self, piece: Piece, token: int, output: Output) -> bool:
        stop_token = token in self._stop_ids and output.finish_reason is not None
        one_call = self._tools is not None and self._tools.done
        if self._stops.found or one_call or stop_token:
            piece.finish_reason = "stop"
        return piece.finish_reason is not None

    def _finish(self, piece: Piece) -> None:
        if not self._stops.found:
            self._release(piece, self._detokenizer.flush())
        if not self._stops.found:
            self._release_held(piece)
        if self._tools is not None:
            _append(piece, self._tools.flush(cut=piece.finish_reason == "length"))
            if self._tools.num_calls and piece.finish_reason == "stop":
                piece.finish_reason = "tool_calls"

    def _release_held(self, piece: Piece) -> None:
        held = self._stops.flush()
        _append(piece, [held] if self._tools is None else self._tools.add(held))
        piece.scores.extend(self._scores)
        self._scores.clear()


def _append(piece: Piece, parts: Iterable[str | ToolCall]) -> None:
    for part in parts:
        if isinstance(part, str):
            piece.text += part
        else:
            piece.tool_calls.append(part)


def _with_scores(output: Output) -> Iterator[tuple[int, TokenLogprobs | None]]:
    if not output.logprobs:
        return ((token, None) for token in output.tokens)
    return zip(output.tokens, output.logprobs, strict=True)


def error_of(output: Output) -> ApiError:
    """The error a client sees when the engine ends a request without an answer."""
    status = output.error_status if output.error is not None else 500
    return ApiError(
        output.error or "The engine ended this request before it was complete. Send it again.",
        status=status,
        type=_ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        code=output.error_code,
        retry_after_s=_retry_after_s(output, status),
    )


def _retry_after_s(output: Output, status: int) -> float | None:
    return _RETRY_AFTER_S.get(status) if output.retry_after_s is None else output.retry_after_s


_ERROR_TYPES = {429: "rate_limit_error"}
# Where the engine does not say: soon enough to use room, not so soon as to storm.
_RETRY_AFTER_S = {429: 1.0, 503: 5.0}
