"""Calls of many kinds, what their clients saw of the answers, and whether two answers are one."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.fault.streams import TIE_NATS, event_lines

TIERS = ("priority", "default", "flex", "batch")
NUM_KINDS = 8
_LEAVES_AFTER = 5
"""Tokens after which a client that gives up does so."""
_SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"enum": [True]}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@dataclass
class Call:
    """What is sent."""

    path: str
    body: dict[str, Any]
    key: str = ""
    """Its bearer token; none where it is empty."""
    leaves: bool = False
    """The client goes away in the middle of the answer."""
    id: str = ""
    """Its `x-request-id`; the server makes one where it is empty."""

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def is_exact(self) -> bool:
        """No margins say how near the two best tokens were: answers must be the same."""
        return "logprobs" not in self.body


@dataclass
class Choice:
    """One of the answers to a call."""

    tokens: list[str | int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """Between the two best log-probabilities, nats; empty where they were not asked for."""
    finish_reason: str | None = None


@dataclass
class Answer:
    """What a client saw."""

    call: Call
    status: int = 0
    id: str = ""
    tier: str = ""
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, int] | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    """It came to its end."""
    left: bool = False
    """The client went away before."""

    @property
    def is_whole(self) -> bool:
        finished = all(choice.finish_reason for choice in self.choices.values())
        return self.done and self.error is None and bool(self.choices) and finished

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices.values())

    def take(self, data: dict[str, Any]) -> None:
        """A whole response or a chunk of a stream."""
        if "error" in data:
            self.error = data["error"]
            return
        self.id, self.tier = data["id"], data["service_tier"]
        self.usage = data.get("usage") or self.usage
        for found in data["choices"]:
            choice = self.choices.setdefault(found["index"], Choice())
            choice.finish_reason = found["finish_reason"] or choice.finish_reason
            choice.tokens.extend(found.get("token_ids") or [])
            for best in _best(found.get("logprobs") or {}):
                # Completions name tokens by their text, which two may share.
                choice.margins.append(best[0] - best[1] if len(best) > 1 else math.inf)


def _best(logprobs: dict[str, Any]) -> Iterator[list[float]]:
    """Log-probabilities of the best tokens of each position, the best first."""
    for scored in logprobs.get("content") or []:
        yield sorted((top["logprob"] for top in scored["top_logprobs"]), reverse=True)
    for tops in logprobs.get("top_logprobs") or []:
        yield sorted(tops.values(), reverse=True)


def mixed_calls(num_calls: int, seed: int, num_tokens: tuple[int, int] = (20, 120)) -> list[Call]:
    """Chats and completions, streamed and whole, of all tiers, most of them greedy."""
    draw = random.Random(seed)
    return [_call(index, draw, draw.randint(*num_tokens)) for index in range(num_calls)]


def _call(index: int, draw: random.Random, num_tokens: int) -> Call:
    """The kinds take turns; what they share is in the first lines."""
    preface = "the quick brown fox jumps over the lazy dog " * (10 * (index % 3))
    text = f"{preface} call {index} " + "hello world " * draw.randint(1, 12)
    body: dict[str, Any] = {
        "service_tier": draw.choice(TIERS),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    kind = index % NUM_KINDS
    is_chat = kind in (0, 1, 4, 5, 7)
    if is_chat:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = (
            text if kind != 6 else [(index * 7 + i) % 400 for i in range(len(text) // 2)]
        )
    if kind in (0, 2, 4, 6):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind in (0, 1):
        body |= {"logprobs": True, "top_logprobs": 2}
    elif kind in (2, 3, 6):
        body |= {"logprobs": 2}
    body |= _KINDS.get(kind, {})
    return Call("/v1/chat/completions" if is_chat else "/v1/completions", body)


_KINDS: dict[int, dict[str, Any]] = {
    3: {"n": 2},
    4: {"temperature": 0.9, "top_p": 0.95, "seed": 11},
    5: {"frequency_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {"40": 2.0}},
    7: {
        "ignore_eos": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}},
    },
}


async def ask(http: httpx.AsyncClient, call: Call, answer: Answer) -> None:
    """Send a call and fill its answer as it comes."""
    headers = {"authorization": f"Bearer {call.key}"} if call.key else {}
    if call.id:
        headers["x-request-id"] = call.id
    async with http.stream("POST", call.path, json=call.body, headers=headers) as response:
        answer.status = response.status_code
        if not call.streams or response.status_code != 200:
            answer.take(json.loads(await response.aread()))
            answer.done = True
            return
        async for line in event_lines(response):
            if line == "data: [DONE]":
                answer.done = True
            else:
                answer.take(json.loads(line.removeprefix("data: ")))
            if call.leaves and answer.num_tokens >= _LEAVES_AFTER:
                answer.left = True
                return


async def ask_all(
    http: httpx.AsyncClient, calls: list[Call], answers: list[Answer], num_at_a_time: int = 24
) -> None:
    """Some at a time; `answers` gets one for each call, in their order, before it is sent."""
    slots = asyncio.Semaphore(num_at_a_time)
    answers.extend(Answer(call) for call in calls)

    async def one(answer: Answer) -> None:
        async with slots:
            await ask(http, answer.call, answer)

    await asyncio.gather(*(one(answer) for answer in answers))


def difference(got: Answer, reference: Answer) -> str | None:
    """In words, where an answer differs from the reference by more than rounding."""
    if sorted(got.choices) != sorted(reference.choices):
        return f"choices {sorted(got.choices)}, not {sorted(reference.choices)}"
    for index, expected in reference.choices.items():
        found = _difference(got.choices[index], expected, exact=got.call.is_exact)
        if found is not None:
            return f"choice {index}: {found}"
    return None


def _difference(got: Choice, expected: Choice, *, exact: bool) -> str | None:
    for i, (here, there) in enumerate(zip(got.tokens, expected.tokens, strict=False)):
        if here != there:
            if not exact and expected.margins[i] < TIE_NATS:
                return None
            return f"token {i} is {here}, not {there}"
    if len(got.tokens) != len(expected.tokens):
        return f"{len(got.tokens)} tokens, not {len(expected.tokens)}"
    if got.finish_reason != expected.finish_reason:
        return f"ended by {got.finish_reason}, not {expected.finish_reason}"
    return None
