"""What the engine says once for all requests, and what the server makes of it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nitsum.engine.client import Inbox
from nitsum.engine.outputs import Outbox
from nitsum.messages import Output, SwitchReport, TokenLogprobs, Tokens
from nitsum.plan import Group
from nitsum.request import Request, SamplingParams
from nitsum.sequence import Sequence

OUTPUT = Output("a", [1], tier="flex", plan="TP1", lane="TP1@0", num_cached=16, queue_s=0.5)


def of(request_id: str, token: int, **changes: object) -> Output:
    return replace(OUTPUT, request_id=request_id, tokens=[token], **changes)


def running(request_id: str = "a") -> Sequence:
    sequence = Sequence(Request(request_id, [1, 2], SamplingParams(max_tokens=1000), tier="flex"))
    sequence.group = Group(1, 0)
    return sequence


def test_the_first_output_is_whole_and_the_next_are_columns():
    outbox, a, b = Outbox(), running("a"), running("b")
    outbox.put_token(a, 1, "TP1")
    outbox.put_token(b, 2, "TP1")
    first = outbox.take()
    assert [(o.request_id, o.tokens, o.lane) for o in first if isinstance(o, Output)] == [
        ("a", [1], "TP1@0"),
        ("b", [2], "TP1@0"),
    ]
    outbox.put_token(a, 3, "TP1")
    outbox.put_token(b, 4, "TP1")
    assert outbox.take() == [Tokens(["a", "b"], [3, 4])]
    outbox.put_token(a, 5, "TP1")
    assert outbox.take() == [Tokens(["a"], [5])]


def move(sequence: Sequence) -> None:
    sequence.group = Group(2, 0)


def displace(sequence: Sequence) -> None:
    sequence.num_displaced += 1


@pytest.mark.parametrize(
    ("change", "plan"), [(move, "TP1"), (displace, "TP1"), (lambda _: None, "TP2")]
)
def test_what_changes_is_said_in_full_and_once(change: Callable[[Sequence], None], plan: str):
    outbox, sequence = Outbox(), running()
    outbox.put_token(sequence, 1, "TP1")
    outbox.take()
    change(sequence)
    outbox.put_token(sequence, 2, plan)
    (told,) = outbox.take()
    assert isinstance(told, Output)
    assert (told.plan, told.num_displaced) == (plan, sequence.num_displaced)
    assert told.lane == str(sequence.group)
    outbox.put_token(sequence, 3, plan)
    assert outbox.take() == [Tokens(["a"], [3])]


Saying = tuple[str, int, str]
SAYINGS = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.integers(0, 9), st.sampled_from(["more", "more", "move", "end"])
    ),
    max_size=20,
)


@settings(max_examples=200)
@given(turns=st.lists(SAYINGS, max_size=4), reads=st.lists(st.booleans(), max_size=20))
def test_readers_hear_what_the_engine_said(turns: list[list[Saying]], reads: list[bool]):
    """Every token and fact, in order, however often a reader looks."""
    outbox, said = Outbox(), defaultdict[str, list[tuple[int, str, str | None]]](list)
    inboxes, heard = defaultdict[str, Inbox](Inbox), defaultdict[str, list[Output]](list)
    sequences = {name: running(name) for name in "abc"}
    looks = iter(reads)
    for turn in turns:
        for name, token, what in turn:
            said[name].append(say(outbox, sequences[name], token, what))
            if what == "end":
                sequences[name] = running(name)  # another one by the same name
            if token == 9:
                outbox.put(SwitchReport("op", "TP1", "TP2", ok=True))
        for message in outbox.take():
            if isinstance(message, Tokens):
                for request_id, token in zip(message.request_ids, message.tokens, strict=True):
                    inboxes[request_id].put_token(token)
            elif isinstance(message, Output):
                inboxes[message.request_id].put(message)
        if next(looks, False):
            read_all(inboxes, heard)
    read_all(inboxes, heard)
    assert {name: [fact for output in found for fact in facts(output)]
            for name, found in heard.items()} == said  # fmt: skip


def say(outbox: Outbox, sequence: Sequence, token: int, what: str) -> tuple[int, str, str | None]:
    if what == "move":
        sequence.group = Group(1, sequence.group.index + 1) if sequence.group else None
    if what == "end":
        sequence.finish_reason = "stop"
        outbox.put_output(sequence, token, "TP1")
    else:
        outbox.put_token(sequence, token, "TP1")
    return token, str(sequence.group), sequence.finish_reason


def facts(output: Output) -> list[tuple[int, str, str | None]]:
    ends = [None] * (len(output.tokens) - 1) + [output.finish_reason]
    return [(t, output.lane, end) for t, end in zip(output.tokens, ends, strict=True)]


def read_all(inboxes: dict[str, Inbox], heard: dict[str, list[Output]]) -> None:
    async def read() -> None:
        for name, inbox in inboxes.items():
            while inbox.has_unread:
                heard[name].append(await inbox.get())

    asyncio.run(read())


def test_a_reader_that_is_behind_gets_tokens_together():
    inbox = Inbox()
    inbox.put(of("a", 1))

    async def read() -> None:
        assert (await inbox.get()).tokens == [1]
        for token in (2, 3, 4):
            inbox.put_token(token)
        inbox.put(of("a", 5, finish_reason="stop"))
        output = await inbox.get()
        assert (output.tokens, output.tier, output.num_cached) == ([2, 3, 4], "flex", 16)
        assert (await inbox.get()).finish_reason == "stop"
        assert not inbox.has_unread

    asyncio.run(read())


def test_a_token_wakes_its_reader_alone():
    async def read() -> None:
        inbox = Inbox()
        inbox.put(of("a", 1))
        await inbox.get()
        reader = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        assert not reader.done()
        inbox.put_token(2)
        assert (await asyncio.wait_for(reader, 1)).tokens == [2]

    asyncio.run(read())


def test_logprobs_of_one_token_are_not_those_of_the_next():
    async def read() -> None:
        inbox = Inbox()
        inbox.put(of("a", 1, logprobs=[TokenLogprobs(-1.0, [], [])], logits=[b"x"]))
        inbox.put_token(2)
        await inbox.get()
        output = await inbox.get()
        assert (output.logprobs, output.logits) == ([], [])

    asyncio.run(read())
