"""What the engine says once for all requests, and what the server makes of it."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nitsum.engine.client import Inbox
from nitsum.engine.ipc import Columns
from nitsum.messages import FromEngine, Output, SwitchReport, TokenLogprobs, Tokens

OUTPUT = Output("a", [1], tier="flex", plan="TP1", lane="TP1@0", num_cached=16, queue_s=0.5)


def of(request_id: str, token: int, **changes: object) -> Output:
    return replace(OUTPUT, request_id=request_id, tokens=[token], **changes)


def test_the_first_output_is_whole_and_the_next_are_columns():
    columns = Columns()
    first = [of("a", 1), of("b", 2)]
    assert columns.gather(first) == first
    assert columns.gather([of("a", 3), of("b", 4)]) == [Tokens(["a", "b"], [3, 4])]


def test_what_changes_is_said_in_full():
    columns = Columns()
    columns.gather([of("a", 1)])
    changes: list[dict[str, object]] = [
        {"tier": "batch"},
        {"lane": "TP2@0"},
        {"plan": "TP2"},
        {"num_displaced": 1},
        {"logprobs": [TokenLogprobs(-1.0, [], [])]},
        {"logits": [b"x"]},
        {"tokens": [1, 2]},
        {"tokens": []},
    ]
    for change in changes:
        output = replace(of("a", 2), **change)
        assert columns.gather([output]) == [output]
        columns.gather([of("a", 1)])  # back to where it was
    assert columns.gather([of("a", 9)]) == [Tokens(["a"], [9])]


def test_a_request_that_ended_is_forgotten():
    columns = Columns()
    columns.gather([of("a", 1), of("b", 1), of("a", 2, finish_reason="stop")])
    columns.forget("b")
    again = [of("a", 3), of("b", 3)]
    assert columns.gather(again) == again


MESSAGES = st.lists(
    st.one_of(
        st.builds(of, st.sampled_from("abc"), st.integers(0, 9)),
        st.builds(of, st.sampled_from("abc"), st.integers(0, 9), lane=st.just("TP2@0")),
        st.builds(of, st.sampled_from("abc"), st.integers(0, 9), finish_reason=st.just("stop")),
        st.just(SwitchReport("op", "TP1", "TP2", ok=True)),
    ),
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(turns=st.lists(MESSAGES, max_size=4), reads=st.lists(st.booleans(), max_size=20))
def test_readers_hear_what_the_engine_said(turns: list[list[FromEngine]], reads: list[bool]):
    """Every token and fact, in order, however often a reader looks."""
    columns, said = Columns(), defaultdict[str, list[tuple[int, str, str | None]]](list)
    inboxes, heard = defaultdict[str, Inbox](Inbox), defaultdict[str, list[Output]](list)
    looks = iter(reads)
    for turn in turns:
        for message in turn:
            if isinstance(message, Output):
                said[message.request_id].append(
                    (message.tokens[0], message.lane, message.finish_reason)
                )
        for message in columns.gather(turn):
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
